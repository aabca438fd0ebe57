//! `bench-quantize`: what quantising costs in quality, ours and llama.cpp's formats at their bits per weight.
//!
//! The bases are the two real models in f32, as published and with noise that takes away the grid they were published on
//! (`benches/noise.py` says why). Each format is made of a base by its own program, with and without a text to weigh errors by,
//! and held against that base on another text. As in `quality`, programs do the measuring.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::{
    Steps, peer,
    quality::{CTX_SIZE, Figures, Programs, book},
};

/// Of each matrix' root mean square.
const NOISE: &str = "0.06";
const SEED: &str = "2026";
/// Windows of the calibrating text, for both programs.
const CALIBRATION_CHUNKS: &str = "16";
/// Reads and writes GGUF; brings numpy.
const GGUF: &str = "gguf==0.19.0";

const CARDS: [&str; 2] = ["smollm2-135m", "gemma3-270m"];

/// A row: who makes it, of what, and whether a text tells which errors weigh.
struct Format {
    name: &'static str,
    maker: Maker,
    calibrated: bool,
}

enum Maker {
    Ours(&'static str),
    /// int4 with the bits of the row of theirs before it.
    OursAsLarge,
    Theirs(&'static str),
}

const FORMATS: [Format; 11] = [
    Format { name: "ours int8", maker: Maker::Ours("int8"), calibrated: false },
    Format { name: "Q8_0", maker: Maker::Theirs("q8_0"), calibrated: false },
    Format { name: "ours int4", maker: Maker::Ours("int4"), calibrated: false },
    Format { name: "ours int4, calibrated", maker: Maker::Ours("int4"), calibrated: true },
    Format { name: "Q4_0", maker: Maker::Theirs("q4_0"), calibrated: false },
    Format { name: "Q4_0 with imatrix", maker: Maker::Theirs("q4_0"), calibrated: true },
    Format { name: "Q4_K_S with imatrix", maker: Maker::Theirs("q4_k_s"), calibrated: true },
    Format { name: "Q4_K_M", maker: Maker::Theirs("q4_k_m"), calibrated: false },
    Format { name: "Q4_K_M with imatrix", maker: Maker::Theirs("q4_k_m"), calibrated: true },
    Format { name: "ours at Q4_K_M's bits", maker: Maker::OursAsLarge, calibrated: false },
    Format { name: "ours at Q4_K_M's bits, calibrated", maker: Maker::OursAsLarge, calibrated: true },
];

/// Scores `chunks` windows of every format of every base.
pub(crate) fn run(steps: &mut Steps, chunks: u32) -> Result<()> {
    let peer::Built { bindery, bin, folder } = peer::build_both(steps)?;
    let python = peer::python_with(steps, &folder, &[GGUF])?;
    let folder = folder.join("quantize");
    fs::create_dir_all(&folder)?;
    let (scored, calibrating) = (folder.join("scored.txt"), folder.join("calibrating.txt"));
    let book = book()?;
    let middle = book[..book.len() / 2].rfind("\n\n").context("the book is one paragraph")?;
    fs::write(&scored, &book[..middle])?;
    fs::write(&calibrating, &book[middle..])?;

    let threads = peer::threads();
    let mut text = peer::circumstances(&threads)?;
    let _ = writeln!(
        text,
        "- text: first half of the book scored in {chunks} windows of {CTX_SIZE}, {CALIBRATION_CHUNKS} windows of the second half \
         calibrate both programs\n\n| base | format | bits per weight | perplexity | KL divergence to f32 | same top, % |\n\
         |---|---|---|---|---|---|"
    );
    for card in CARDS {
        let published = peer::card(&bindery, card)?;
        let plain = folder.join(format!("{card}.f32.gguf"));
        if !plain.is_file() {
            quantize(&bin, &published, &plain, "f32", None)?;
        }
        let noisy = folder.join(format!("{card}.noise.gguf"));
        if !noisy.is_file() {
            add_noise(steps, &python, &plain, &noisy)?;
        }
        for (name, base) in [(format!("{card}, as published"), plain), (format!("{card} with noise"), noisy)] {
            let programs = Programs {
                bindery: bindery.clone(),
                bin: bin.clone(),
                model: base,
                text: scored.clone(),
                threads: threads.clone(),
                chunks: chunks.to_string(),
                folder: folder.clone(),
            };
            text.push_str(&rows(steps, &programs, &name, &calibrating)?);
        }
    }
    print!("\n{text}");
    let results = folder.join("quantize.md");
    fs::write(&results, text)?;
    println!("written to {}", results.display());
    Ok(())
}

/// All formats of one base.
fn rows(steps: &mut Steps, programs: &Programs, base: &str, calibrating: &Path) -> Result<String> {
    steps.begin(&format!("{base}: f32"));
    let perplexity = programs.their_base(&programs.model)?;
    let perplexity = perplexity.split(' ').next().unwrap_or_default();
    let mut text = format!("| {base} | f32 | 32 | {perplexity} | 0 | 100 |\n");
    steps.end();
    steps.begin(&format!("{base}: imatrix"));
    let importance = programs.folder.join("imatrix.gguf");
    let mut imatrix = Command::new(programs.bin.join("llama-imatrix"));
    imatrix.arg("-m").arg(&programs.model).arg("-f").arg(calibrating).arg("-o").arg(&importance);
    imatrix.args(["--chunks", CALIBRATION_CHUNKS, "--ctx-size", CTX_SIZE, "--threads", &programs.threads]);
    output(&mut imatrix)?;
    steps.end();
    let mut their_bits = String::new();
    for Format { name, maker, calibrated } in FORMATS {
        steps.begin(&format!("{base}: {name}"));
        let (bits, figures) = match maker {
            Maker::Ours(_) | Maker::OursAsLarge => {
                let made = programs.folder.join("ours");
                if made.exists() {
                    fs::remove_dir_all(&made)?;
                }
                let mut command = Command::new(&programs.bindery);
                command.arg("quantize").arg(&programs.model).arg(&made).arg("--json");
                match maker {
                    Maker::Ours(format) => command.args(["--quantize", format]),
                    _ => command.args(["--quantize", "int4", "--bits-per-weight", &their_bits]),
                };
                if calibrated {
                    command.arg("--calibrate").arg(calibrating).args(["--chunks", CALIBRATION_CHUNKS]);
                    command.args(["--ctx-size", CTX_SIZE]);
                }
                let report: Value = serde_json::from_str(&output(command.args(["--threads", &programs.threads]))?)?;
                let bits = report["total"]["bits_per_weight"].as_f64().context("no bits per weight")?;
                (format!("{bits:.2}"), programs.ours(&made, &[])?.0)
            }
            Maker::Theirs(format) => {
                let made = programs.folder.join("theirs.gguf");
                let said = quantize(&programs.bin, &programs.model, &made, format, calibrated.then_some(&importance))?;
                let bits = said.lines().filter(|line| line.contains("quant size")).find_map(|line| {
                    let (_, bits) = line.split_once('(')?;
                    Some(bits.split(' ').next()?.to_owned())
                });
                their_bits = bits.context("llama-quantize printed no bits per weight")?;
                (their_bits.clone(), programs.theirs(&made, &[])?)
            }
        };
        let Figures { perplexity, kl_mean, same_top, .. } = figures;
        let short = |figure: &str| figure.split(' ').next().unwrap_or_default().to_owned();
        let row = format!("| | {name} | {bits} | {} | {kl_mean} | {} |\n", short(&perplexity), short(&same_top));
        print!("{row}");
        text.push_str(&row);
        steps.end();
    }
    // Gigabytes that the next base makes anew.
    fs::remove_file(programs.folder.join("f32.kld"))?;
    Ok(text)
}

/// What llama-quantize said while it made `to`.
fn quantize(bin: &Path, from: &Path, to: &Path, format: &str, importance: Option<&PathBuf>) -> Result<String> {
    let mut command = Command::new(bin.join("llama-quantize"));
    command.arg("--allow-requantize");
    if let Some(importance) = importance {
        command.arg("--imatrix").arg(importance);
    }
    let (text, notes) = run_to_end(command.arg(from).arg(to).arg(format))?;
    Ok(text + &notes)
}

fn output(command: &mut Command) -> Result<String> {
    Ok(run_to_end(command)?.0)
}

/// What it wrote to standard output and to standard error.
fn run_to_end(command: &mut Command) -> Result<(String, String)> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot start {command:?}"))?;
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    if !output.status.success() {
        bail!("{command:?} failed:\n{errors}");
    }
    Ok((String::from_utf8_lossy(&output.stdout).into_owned(), errors))
}

/// Makes `to` of `from` by `benches/noise.py`.
fn add_noise(steps: &mut Steps, python: &Path, from: &Path, to: &Path) -> Result<()> {
    let unfinished = to.with_extension("unfinished");
    fs::copy(from, &unfinished)?;
    let mut command = Command::new(python);
    command.arg(Path::new("benches").join("noise.py")).arg(&unfinished).args([NOISE, SEED]);
    steps.run("noise", &mut command)?;
    Ok(fs::rename(unfinished, to)?)
}
