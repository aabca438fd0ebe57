//! The list of commands: `cargo xtask <verb>`. It calls programs and holds no logic that a test or a library could
//! hold; it needs nothing but cargo (and, for the client SDK tests, a Python 3.10 or later with venv).
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command-line tool talks to its terminal")]

mod peer;
mod quality;
mod quantising;
mod tokenizers;
mod vocabularies;

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

const USAGE: &str = "\
cargo xtask <verb>

  test [--full] [--install] [--no-python]
          everything CI runs: format, lints, unit, property and whole-system tests, docs
          --full       also what takes long: more property cases, longer churn over HTTP, Miri over the kernels without
                       intrinsics and the kernels on emulated aarch64, where the machine has what they need
          --install    installs what is missing: cargo-deny; with --full also Miri, the aarch64 target and, as root on
                       Debian, its emulator and linker (else what is missing is named, skipped and counted; as root in CI
                       cargo-deny is installed without being asked)
          --no-python  leave out the client SDK tests (skipped aloud)
  lint    format and lints only
  docs    the API documentation, warnings denied
  vocabularies
          fetches what the tests of tokenizers and chat templates compare with, and says how to name it to them
  system [PYTEST ARGS...]
          only the whole-system tests with real clients; further arguments go to pytest
  bench-peer [ROUNDS]
          builds llama.cpp (once, in target/peer), serves the same model with it and with us, loads both in turns
          (ROUNDS A B A B, default 3) and prints the tables; needs python3, a C++ compiler and a quiet machine
  bench-quality [CHUNKS]
          perplexity and KL divergence to f32, ours and llama.cpp's (built as above), over CHUNKS windows of 512 tokens
          (default 32) of a book; prints the table. The peer's f32 logits take 25 MB of disk a window meanwhile
  bench-quantize [CHUNKS]
          what quantising costs: the two real models in f32, as published and with noise, in our formats and llama.cpp's,
          over CHUNKS windows (default 8); prints the table. Needs 6 GB of disk
  help    this text
";

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &[String]) -> Result<()> {
    let root = root();
    env::set_current_dir(&root).with_context(|| format!("cannot enter {}", root.display()))?;
    let mut steps = Steps::default();
    match args.split_first() {
        Some((verb, rest)) if verb == "test" => test(&mut steps, &TestOptions::parse(rest)?)?,
        Some((verb, [])) if verb == "lint" => lint(&mut steps)?,
        Some((verb, [])) if verb == "docs" => docs(&mut steps)?,
        Some((verb, [])) if verb == "vocabularies" => {
            if let Some(folder) = vocabularies::fetch(&mut steps)? {
                println!("BINDERY_TEST_VOCABULARIES={}", folder.display());
            }
            if let Some(folder) = tokenizers::fetch(&mut steps)? {
                println!("BINDERY_TEST_TOKENIZERS={}", folder.display());
            }
        }
        Some((verb, rest)) if verb == "system" => {
            build_binary(&mut steps)?;
            let model = fetch_model(&mut steps)?;
            python_tests(&mut steps, &model, false, rest)?;
        }
        Some((verb, rest)) if verb == "bench-peer" && rest.len() < 2 => {
            let rounds = rest.first().map_or(Ok(3), |rounds| rounds.parse()).context("ROUNDS is a number")?;
            peer::run(&mut steps, rounds)?;
        }
        Some((verb, rest)) if verb == "bench-quality" && rest.len() < 2 => {
            let chunks = rest.first().map_or(Ok(32), |chunks| chunks.parse()).context("CHUNKS is a number")?;
            quality::run(&mut steps, chunks)?;
        }
        Some((verb, rest)) if verb == "bench-quantize" && rest.len() < 2 => {
            let chunks = rest.first().map_or(Ok(8), |chunks| chunks.parse()).context("CHUNKS is a number")?;
            quantising::run(&mut steps, chunks)?;
        }
        None => print!("{USAGE}"),
        Some((verb, _)) if verb == "help" || verb == "--help" => print!("{USAGE}"),
        Some((verb, _)) => bail!("unknown verb or arguments after '{verb}'\n\n{USAGE}"),
    }
    steps.report();
    Ok(())
}

struct TestOptions {
    full: bool,
    install: bool,
    python: bool,
}

impl TestOptions {
    fn parse(args: &[String]) -> Result<Self> {
        let mut options = Self { full: false, install: false, python: true };
        for arg in args {
            match arg.as_str() {
                "--full" => options.full = true,
                "--install" => options.install = true,
                "--no-python" => options.python = false,
                other => bail!("unknown argument '{other}' to test\n\n{USAGE}"),
            }
        }
        Ok(options)
    }
}

fn test(steps: &mut Steps, options: &TestOptions) -> Result<()> {
    lint(steps)?;
    build_binary(steps)?;
    let model = fetch_model(steps)?;
    let mut cargo_test = cargo();
    cargo_test.args(["test", "--workspace", "--no-fail-fast"]).env("BINDERY_TEST_MODEL", &model);
    if !options.python {
        steps.skip("the families' real vocabularies and chat templates: --no-python was given");
    } else if let Some(folder) = vocabularies::fetch(steps)? {
        cargo_test.env("BINDERY_TEST_VOCABULARIES", folder);
    }
    if let Some(folder) = tokenizers::fetch(steps)? {
        cargo_test.env("BINDERY_TEST_TOKENIZERS", folder);
    }
    if options.full {
        cargo_test.env("BINDERY_TEST_FULL", "1").env("BINDERY_TEST_GEMMA", fetch(steps, peer::GEMMA)?);
    }
    steps.run("unit, property and documentation tests", &mut cargo_test)?;
    docs(steps)?;
    if options.python {
        python_tests(steps, &model, options.full, &[])?;
    } else {
        steps.skip("client SDK tests: --no-python was given");
    }
    licences(steps, options.install)?;
    if options.full {
        if options.install {
            install_full(steps);
        }
        miri(steps)?;
        emulated_aarch64(steps)?;
    }
    Ok(())
}

fn lint(steps: &mut Steps) -> Result<()> {
    steps.run("format", cargo().args(["fmt", "--all", "--check"]))?;
    steps.run("lints", cargo().args(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))
}

fn docs(steps: &mut Steps) -> Result<()> {
    let mut doc = cargo();
    doc.args(["doc", "--workspace", "--no-deps", "--document-private-items"]).env("RUSTDOCFLAGS", "-D warnings");
    steps.run("documentation", &mut doc)
}

fn build_binary(steps: &mut Steps) -> Result<()> {
    steps.run("build", cargo().args(["build", "--package", "bindery"]))
}

fn fetch_model(steps: &mut Steps) -> Result<PathBuf> {
    fetch(steps, peer::SMOLLM)
}

/// A model, by the very path a user takes. Its answer is the file's path, alone on stdout.
fn fetch(steps: &mut Steps, card: &str) -> Result<PathBuf> {
    steps.begin(&format!("fetch {card}"));
    let output = Command::new(binary())
        .args(["pull", card])
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot start {}", binary().display()))?;
    if !output.status.success() {
        bail!("`bindery pull {card}` failed; the tests need this model");
    }
    let path = PathBuf::from(String::from_utf8(output.stdout).context("pull printed no UTF-8")?.trim());
    if !path.is_file() {
        bail!("`bindery pull` named {}, which is no file", path.display());
    }
    steps.end();
    Ok(path)
}

/// The Python of a virtual environment of our own with pinned packages; what is missing is named and skipped.
fn python_environment(steps: &mut Steps) -> Result<Option<PathBuf>> {
    python_environment_of(steps, "venv", "requirements.txt")
}

/// The same of this name, with the packages that a file of `tests/system` pins.
fn python_environment_of(steps: &mut Steps, name: &str, requirements: &str) -> Result<Option<PathBuf>> {
    let python = env::var_os("BINDERY_PYTHON").unwrap_or_else(|| OsString::from("python3"));
    let venv = target_dir().join(name);
    let venv_python = venv.join("bin").join("python");
    let requirements = Path::new("tests").join("system").join(requirements);
    let stamp = venv.join("requirements.stamp");
    let wanted = std::fs::read_to_string(&requirements)?;
    if std::fs::read_to_string(&stamp).ok().as_deref() != Some(wanted.as_str()) {
        if !Command::new(&python).arg("--version").output().is_ok_and(|output| output.status.success()) {
            steps.skip("what needs Python: no python3 found (set BINDERY_PYTHON to one)");
            return Ok(None);
        }
        // Debian's python3 comes without it.
        if !Command::new(&python).args(["-c", "import venv, ensurepip"]).output().is_ok_and(|o| o.status.success()) {
            steps.skip("what needs Python: python3 has no venv (Debian: apt-get install python3-venv)");
            return Ok(None);
        }
        steps.run("python environment", Command::new(&python).args(["-m", "venv", "--clear"]).arg(&venv))?;
        let mut install = Command::new(&venv_python);
        install.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r"]).arg(&requirements);
        steps.run("python packages", &mut install)?;
        std::fs::write(&stamp, wanted)?;
    }
    Ok(Some(venv_python))
}

/// Real client SDKs against the real binary.
fn python_tests(steps: &mut Steps, model: &Path, full: bool, extra: &[String]) -> Result<()> {
    let Some(venv_python) = python_environment(steps)? else { return Ok(()) };
    let litellm = if full { python_environment_of(steps, "venv-litellm", "litellm.txt")? } else { None };
    let llama_server = Some(peer::llama_server()).filter(|program| full && program.is_file());
    if full && llama_server.is_none() {
        steps.skip("llama-server as an upstream: `cargo xtask bench-peer` builds it");
    }
    let pytest = |folder: &str| {
        let mut pytest = Command::new(&venv_python);
        pytest
            .args(["-m", "pytest", "-p", "no:cacheprovider", "-q", folder])
            .env("BINDERY_BIN", binary())
            .env("BINDERY_TEST_MODEL", model)
            // `cargo test` has built it with the other examples.
            .env("BINDERY_TRANSLATE", target_dir().join("debug").join("examples").join("translate"))
            .env("PYTHONDONTWRITEBYTECODE", "1");
        if full {
            pytest.env("BINDERY_TEST_FULL", "1");
        }
        if let Some(python) = &litellm {
            pytest.env("BINDERY_LITELLM", python.with_file_name("litellm"));
        }
        if let Some(program) = &llama_server {
            pytest.env("BINDERY_LLAMA_SERVER", program);
        }
        pytest
    };
    steps.run("whole-system tests with real clients", pytest("tests/system").args(extra))?;
    // In a run of its own: each folder has a conftest.
    if extra.is_empty() {
        steps.run("providers' own SDKs as judges of the gateway", &mut pytest("tests/gateway"))?;
    }
    Ok(())
}

fn licences(steps: &mut Steps, install: bool) -> Result<()> {
    let present = || cargo().args(["deny", "--version"]).output().is_ok_and(|output| output.status.success());
    let is_root_in_ci = env::var_os("CI").is_some() && is_root();
    if !present() && (install || is_root_in_ci) {
        let mut install = cargo();
        install.args(["install", "--quiet", "--locked", "cargo-deny@0.20.2"]);
        // A folder of the checkout's compilers would be cleaned with it.
        install.env_remove("CARGO_TARGET_DIR");
        steps.attempt("install cargo-deny", &mut install);
    }
    if present() {
        steps.run("licences, bans and sources", cargo().args(["deny", "check", "licenses", "bans", "sources"]))
    } else {
        steps.skip("licences: cargo-deny is not installed (cargo install --locked cargo-deny)");
        Ok(())
    }
}

/// What `--full` needs beyond `cargo xtask test`. What cannot be had is skipped where it is wanted.
fn install_full(steps: &mut Steps) {
    let mut nightly = Command::new("rustup");
    nightly.args(["toolchain", "install", "nightly", "--profile", "minimal", "--component", "miri,rust-src"]);
    steps.attempt("install Miri", &mut nightly);
    steps.attempt("install the aarch64 target", Command::new("rustup").args(["target", "add", AARCH64]));
    if is_root() {
        let mut tools = Command::new("apt-get");
        tools.args(["install", "-y", "-qq", "qemu-user", "gcc-aarch64-linux-gnu", "libc6-dev-arm64-cross"]);
        steps.attempt("install the emulator and its linker", tools.env("DEBIAN_FRONTEND", "noninteractive"));
    }
}

fn is_root() -> bool {
    Command::new("id").arg("-u").output().is_ok_and(|output| output.stdout.trim_ascii() == b"0")
}

fn miri(steps: &mut Steps) -> Result<()> {
    let present = Command::new("cargo").args(["+nightly", "miri", "--version"]).output();
    if present.is_ok_and(|output| output.status.success()) {
        let mut miri = Command::new("cargo");
        // The scalar twins' own tests are in the second: the library's are of packing, memory, the pool and a few functions.
        miri.args(["+nightly", "miri", "test", "--package", "bindery-kernels", "--lib", "--test", "truth"])
            .env("MIRIFLAGS", "-Zmiri-disable-isolation")
            .env("BINDERY_ISA", "scalar")
            .env("PROPTEST_CASES", "4");
        steps.run("Miri over the scalar twins, the packing and the pool", &mut miri)
    } else {
        steps.skip("Miri: the nightly toolchain has no miri component (rustup +nightly component add miri)");
        Ok(())
    }
}

const AARCH64: &str = "aarch64-unknown-linux-gnu";

fn emulated_aarch64(steps: &mut Steps) -> Result<()> {
    let has_target = Command::new("rustc")
        .args(["--print", "target-libdir", "--target", AARCH64])
        .output()
        .is_ok_and(|output| Path::new(String::from_utf8_lossy(&output.stdout).trim()).is_dir());
    let has_tool =
        |name: &str| Command::new(name).arg("--version").output().is_ok_and(|output| output.status.success());
    if has_target && has_tool("qemu-aarch64") && has_tool("aarch64-linux-gnu-gcc") {
        let mut test = cargo();
        test.args(["test", "--package", "bindery-kernels", "--target", AARCH64])
            .env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER", "aarch64-linux-gnu-gcc")
            .env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER", "qemu-aarch64 -cpu max -L /usr/aarch64-linux-gnu");
        steps.run("kernels on emulated aarch64", &mut test)
    } else {
        steps.skip("emulated aarch64: needs the rustup target, qemu-user and gcc-aarch64-linux-gnu");
        Ok(())
    }
}

fn root() -> PathBuf {
    // Asked at run time: a build folder that checkouts share keeps one binary for all of them, and what was built in it may name another.
    let own = env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    own.parent().expect("xtask lies one folder below the root").to_path_buf()
}

fn target_dir() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

fn binary() -> PathBuf {
    target_dir().join("debug").join(format!("bindery{}", env::consts::EXE_SUFFIX))
}

fn cargo() -> Command {
    Command::new(env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo")))
}

/// What ran, how long it took, what was skipped.
#[derive(Default)]
struct Steps {
    done: Vec<(String, f64)>,
    skipped: Vec<String>,
    current: Option<(String, Instant)>,
}

impl Steps {
    fn begin(&mut self, name: &str) {
        println!("--- {name}");
        self.current = Some((name.to_owned(), Instant::now()));
    }

    fn end(&mut self) {
        if let Some((name, start)) = self.current.take() {
            self.done.push((name, start.elapsed().as_secs_f64()));
        }
    }

    fn run(&mut self, name: &str, command: &mut Command) -> Result<()> {
        self.begin(name);
        let status = command.status().with_context(|| format!("cannot start {}", command.get_program().display()))?;
        if !status.success() {
            bail!("step '{name}' failed ({status}): {command:?}");
        }
        self.end();
        Ok(())
    }

    /// Like `run`, but its failure is only told.
    fn attempt(&mut self, name: &str, command: &mut Command) {
        if let Err(error) = self.run(name, command) {
            self.current = None;
            println!("--- {error:#}");
        }
    }

    fn skip(&mut self, what: &str) {
        println!("--- SKIPPED {what}");
        self.skipped.push(what.to_owned());
    }

    fn report(&self) {
        if self.done.is_empty() {
            return;
        }
        println!("\nsteps:");
        for (name, seconds) in &self.done {
            println!("  {seconds:7.1} s  {name}");
        }
        for what in &self.skipped {
            println!("  skipped    {what}");
        }
        println!("{} steps passed, {} skipped", self.done.len(), self.skipped.len());
    }
}
