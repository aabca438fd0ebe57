//! `bench-quality`: perplexity and KL divergence to f32, ours and llama.cpp's, on the same files and the same text.
//!
//! It calls programs and lays what they print side by side; the measuring is `bindery perplexity`'s and
//! llama-perplexity's. The text is a book in the public domain that a crate of ours carries along as its test data, so
//! nothing is fetched for it. What is made lies in `target/peer`.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::{Steps, cargo, peer};

/// What carries the text, and where: "Around the World in Eighty Days" in Project Gutenberg's edition.
const TEXT_CRATE: &str = "esaxx-rs";
const TEXT_FILE: &str = "data/eighty.txt";
/// Tokens of a window, as llama-perplexity has it by default.
pub(crate) const CTX_SIZE: &str = "512";

/// A row: the weights, the cache, and what each program is told for it.
struct Setting {
    name: &'static str,
    /// Of the peer's conversions; None: the model's own file.
    conversion: Option<&'static str>,
    ours: &'static [&'static str],
    theirs: &'static [&'static str],
}

impl Setting {
    const fn plain(name: &'static str, conversion: Option<&'static str>) -> Self {
        Self { name, conversion, ours: &[], theirs: &[] }
    }

    /// The cache alone, without the noise that int8 activations add to every change of them.
    const CACHE_ALONE: Self = Self {
        name: "F32, cache int8 / Q8_0",
        conversion: Some("f32"),
        ours: &["--dtype", "f32", "--kv-cache-dtype", "int8"],
        theirs: &["--cache-type-k", "q8_0", "--cache-type-v", "q8_0"],
    };

    const fn small_cache(name: &'static str) -> Self {
        Self {
            name,
            conversion: None,
            ours: &["--kv-cache-dtype", "int8"],
            theirs: &["--cache-type-k", "q8_0", "--cache-type-v", "q8_0"],
        }
    }
}

/// A real model and the rows it is given.
struct Card {
    name: &'static str,
    /// What its file is called in rows.
    file: &'static str,
    settings: &'static [Setting],
}

const CARDS: [Card; 2] = [
    Card {
        name: peer::SMOLLM,
        file: "Q4_1",
        settings: &[
            Setting::plain("Q4_1, cache f16 (defaults)", None),
            Setting {
                name: "Q4_1, cache f32",
                conversion: None,
                ours: &["--kv-cache-dtype", "f32"],
                theirs: &["--cache-type-k", "f32", "--cache-type-v", "f32"],
            },
            Setting::small_cache("Q4_1, cache int8 / Q8_0"),
            Setting::CACHE_ALONE,
            Setting::plain("F16", Some("f16")),
            Setting::plain("Q8_0", Some("q8_0")),
            Setting::plain("Q4_0", Some("q4_0")),
        ],
    },
    Card {
        name: peer::GEMMA,
        file: "Q4_K_M",
        settings: &[
            Setting::plain("Q4_K_M, cache f16 (defaults)", None),
            Setting::small_cache("Q4_K_M, cache int8 / Q8_0"),
            Setting::CACHE_ALONE,
            Setting::plain("F16", Some("f16")),
            Setting::plain("Q8_0", Some("q8_0")),
        ],
    },
];

/// Figures of a row, as they are printed.
#[derive(Default)]
pub(crate) struct Figures {
    pub(crate) perplexity: String,
    ratio: String,
    pub(crate) kl_mean: String,
    kl_median: String,
    kl_99: String,
    kl_max: String,
    pub(crate) same_top: String,
    rms_delta_p: String,
}

impl Figures {
    fn row(&self, name: &str, who: &str) -> String {
        let Self { perplexity, ratio, kl_mean, kl_median, kl_99, kl_max, same_top, rms_delta_p } = self;
        format!(
            "| {name} | {who} | {perplexity} | {ratio} | {kl_mean} | {kl_median} | {kl_99} | {kl_max} | {same_top} | {rms_delta_p} |\n"
        )
    }
}

/// Scores `chunks` windows of each model with each of its settings.
pub(crate) fn run(steps: &mut Steps, chunks: u32) -> Result<()> {
    let peer::Built { bindery, bin, folder } = peer::build_both(steps)?;
    let book_file = folder.join("eighty.txt");
    fs::write(&book_file, book()?)?;
    let threads = peer::threads();
    let mut text = peer::circumstances(&threads)?;
    let _ = writeln!(text, "- text: {TEXT_FILE} of the crate {TEXT_CRATE}; {chunks} windows of {CTX_SIZE} tokens");
    for card in CARDS {
        let programs = Programs {
            bindery: bindery.clone(),
            bin: bin.clone(),
            model: peer::card(&bindery, card.name)?,
            text: book_file.clone(),
            threads: threads.clone(),
            chunks: chunks.to_string(),
            folder: folder.clone(),
        };
        text.push_str(&table(steps, &programs, &card)?);
    }
    print!("\n{text}");
    let results = folder.join("quality.md");
    fs::write(&results, text)?;
    println!("written to {}", results.display());
    Ok(())
}

/// All rows of a model.
fn table(steps: &mut Steps, programs: &Programs, card: &Card) -> Result<String> {
    let Card { name, file, settings } = card;
    let f32_file = programs.converted(steps, "f32")?;
    steps.begin(&format!("{name}: the peer's f32"));
    let their_base = programs.their_base(&f32_file)?;
    steps.end();
    steps.begin(&format!("{name}: ours on the f32 file, against the widened {file} file"));
    let (widened, our_base) = programs.ours(&f32_file, &["--dtype", "f32"])?;
    steps.end();
    let mut text = format!(
        "\n{name}: perplexity in f32 ours {our_base}, theirs {their_base}; ours on the f32 file that its tool made of the {file} file \
         has a KL divergence of {} (at most {}).\n\n\
         | weights, cache | who | perplexity | to f32's | KL divergence | median | 99 % | most | same top, % | Δp RMS, % |\n\
         |---|---|---|---|---|---|---|---|---|---|\n",
        widened.kl_mean, widened.kl_max
    );
    for setting in *settings {
        steps.begin(&format!("{name}: {}", setting.name));
        let file = match setting.conversion {
            Some(format) => programs.converted(steps, format)?,
            None => programs.model.clone(),
        };
        let (ours, _) = programs.ours(&file, setting.ours)?;
        let theirs = programs.theirs(&file, setting.theirs)?;
        let pair = ours.row(setting.name, "ours") + &theirs.row(setting.name, "theirs");
        print!("{pair}");
        text.push_str(&pair);
        steps.end();
    }
    steps.begin(&format!("{name}: our cache alone"));
    let (cache, _) = programs.measured(&programs.model, &["--kv-cache-dtype", "int8", "--base=stored"])?;
    text.push_str(&cache.row(&format!("{file}, cache int8, to the same with f16"), "ours"));
    steps.end();
    // Gigabytes that the next run makes anew.
    fs::remove_file(programs.folder.join("f32.kld"))?;
    Ok(text)
}

/// The book without what its publisher says before and behind it, with bare line ends.
pub(crate) fn book() -> Result<String> {
    let output = cargo().args(["metadata", "--format-version", "1", "--locked"]).stderr(Stdio::inherit()).output()?;
    let metadata: Value = serde_json::from_slice(&output.stdout).context("cargo metadata printed no JSON")?;
    let packages = metadata["packages"].as_array().map_or(&[][..], Vec::as_slice);
    let package = packages.iter().find(|package| package["name"] == TEXT_CRATE);
    let manifest = package.and_then(|package| package["manifest_path"].as_str());
    let path = Path::new(manifest.with_context(|| format!("{TEXT_CRATE} is no dependency any more"))?);
    let path = path.with_file_name(TEXT_FILE);
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let text = text.replace("\r\n", "\n");
    let body = text.split_once("*** START OF").and_then(|(_, rest)| rest.split_once('\n')).map(|(_, rest)| rest);
    let body = body.and_then(|rest| rest.split_once("End of Project Gutenberg")).map(|(body, _)| body);
    let body = body.with_context(|| format!("{} is not in Project Gutenberg's form any more", path.display()))?;
    Ok(format!("{}\n", body.trim()))
}

pub(crate) struct Programs {
    pub(crate) bindery: PathBuf,
    /// With the peer's programs.
    pub(crate) bin: PathBuf,
    /// What everything is held against.
    pub(crate) model: PathBuf,
    pub(crate) text: PathBuf,
    pub(crate) threads: String,
    pub(crate) chunks: String,
    /// For what is made on the way.
    pub(crate) folder: PathBuf,
}

impl Programs {
    /// See [`peer::converted`].
    fn converted(&self, steps: &mut Steps, format: &str) -> Result<PathBuf> {
        peer::converted(steps, &self.bin, &self.model, format)
    }

    /// llama-perplexity's output.
    fn peer(&self, file: &Path, flags: &[&str]) -> Result<String> {
        let mut command = Command::new(self.bin.join("llama-perplexity"));
        command.arg("--model").arg(file).arg("--file").arg(&self.text).arg("--kl-divergence-base");
        command.arg(self.folder.join("f32.kld"));
        command.args(["--ctx-size", CTX_SIZE, "--chunks", &self.chunks, "--threads", &self.threads]);
        // No figure depends on it, and threads that spin while they wait would slow down whatever runs beside them.
        command.env("OMP_WAIT_POLICY", "passive");
        let output = command.args(flags).output().context("cannot start llama-perplexity")?;
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text).into_owned();
        if !output.status.success() {
            bail!("{command:?} failed:\n{text}");
        }
        Ok(text)
    }

    /// Perplexity with weights and cache in f32; its logits are kept for comparing.
    pub(crate) fn their_base(&self, file: &Path) -> Result<String> {
        let text = self.peer(file, &["--cache-type-k", "f32", "--cache-type-v", "f32"])?;
        let figure = text.lines().find_map(|line| line.split_once("Final estimate: PPL = ")).map(|(_, figure)| figure);
        Ok(figure.context("llama-perplexity printed no estimate")?.trim().replace("+/-", "±"))
    }

    pub(crate) fn theirs(&self, file: &Path, flags: &[&str]) -> Result<Figures> {
        let text = self.peer(file, &[flags, &["--kl-divergence"]].concat())?;
        let figure = |name: &str| -> Result<String> {
            let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
            let found = text.lines().filter_map(|line| line.split_once(':')).find(|(before, _)| words(before) == name);
            let (_, figure) = found.with_context(|| format!("llama-perplexity printed no {name:?}"))?;
            Ok(words(figure).trim_end_matches([' ', '%']).to_owned())
        };
        Ok(Figures {
            perplexity: figure("Mean PPL(Q)")?,
            ratio: figure("Mean PPL(Q)/PPL(base)")?,
            kl_mean: figure("Mean KLD")?,
            kl_median: figure("Median KLD")?,
            kl_99: figure("99.0% KLD")?,
            kl_max: figure("Maximum KLD")?,
            same_top: figure("Same top p")?,
            rms_delta_p: figure("RMS Δp")?,
        })
    }

    /// Against the model widened to f32; with that one's perplexity.
    pub(crate) fn ours(&self, file: &Path, flags: &[&str]) -> Result<(Figures, String)> {
        let model = self.model.to_string_lossy();
        self.measured(file, &[flags, &["--base=f32", "--base-model", &model]].concat())
    }

    fn measured(&self, file: &Path, flags: &[&str]) -> Result<(Figures, String)> {
        let report = self.report(file, flags)?;
        let comparison = &report["comparison"];
        let estimate = |value: &Value, scale: f64, digits: usize| {
            let of = |name: &str| value[name].as_f64().unwrap_or(f64::NAN) * scale;
            format!("{:.digits$} ± {:.digits$}", of("value"), of("standard_error"))
        };
        let divergence = &comparison["kl_divergence"];
        let plain = |name: &str| format!("{:.6}", divergence[name].as_f64().unwrap_or(f64::NAN));
        let figures = Figures {
            perplexity: estimate(&report["perplexity"], 1.0, 6),
            ratio: estimate(&comparison["perplexity_ratio"], 1.0, 6),
            kl_mean: estimate(&divergence["mean"], 1.0, 6),
            kl_median: plain("median"),
            kl_99: plain("p99"),
            kl_max: plain("max"),
            same_top: estimate(&comparison["same_top"], 100.0, 3),
            rms_delta_p: estimate(&comparison["rms_delta_p"], 100.0, 3),
        };
        Ok((figures, estimate(&comparison["base_perplexity"], 1.0, 4)))
    }

    fn report(&self, file: &Path, flags: &[&str]) -> Result<Value> {
        let mut command = Command::new(&self.bindery);
        command.arg("perplexity").arg(file).arg("--file").arg(&self.text);
        command.args(["--ctx-size", CTX_SIZE, "--chunks", &self.chunks, "--threads", &self.threads, "--json"]);
        let output = command.args(flags).stderr(Stdio::inherit()).output()?;
        if !output.status.success() {
            bail!("{command:?} failed");
        }
        serde_json::from_slice(&output.stdout).context("bindery perplexity printed no JSON")
    }
}
