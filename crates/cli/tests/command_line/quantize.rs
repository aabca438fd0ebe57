//! `quantize`: what it prints and makes, that `perplexity` scores it as it scores quantising at load, and what it refuses.

use std::path::Path;

use serde_json::Value;

use crate::support::{TINY_LLAMA, run};

const TINY_GGUF: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/checkpoints/tiny-llama/model.gguf");
/// Ours: English prose.
const PROSE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../ARCHITECTURE.md");

fn perplexity(model: &str, flags: &[&str]) -> f64 {
    let fixed = ["perplexity", model, "--file", PROSE, "--ctx-size", "64", "--chunks", "2", "--json"];
    let ended = run(&[&fixed[..], flags].concat());
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    serde_json::from_str::<Value>(&ended.stdout).unwrap()["perplexity"]["value"].as_f64().unwrap()
}

#[test]
fn a_folder_is_made_and_scores_as_quantising_at_load_does() {
    let home = tempfile::tempdir().unwrap();
    let out = home.path().join("made");
    let out = out.to_str().unwrap();
    let ended = run(&["quantize", TINY_GGUF, out, "--quantize", "int4"]);
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    for word in ["BITS PER WEIGHT", "embedding", "attention", "mlp", "norms, biases, routers", "5.500", " from "] {
        assert!(ended.stdout.contains(word), "{word}: {}", ended.stdout);
    }
    assert_eq!(perplexity(out, &[]), perplexity(TINY_GGUF, &["--quantize", "int4"]));

    let again = run(&["quantize", TINY_GGUF, out, "--quantize", "int4"]);
    assert_eq!(again.code, 1);
    assert!(again.stderr.contains("is there already, and nothing is overwritten"), "{}", again.stderr);
    let twice = run(&["quantize", out, home.path().join("twice").to_str().unwrap(), "--quantize", "int8"]);
    assert_eq!(twice.code, 1);
    assert!(twice.stderr.contains("quantised already"), "{}", twice.stderr);
}

#[test]
fn calibration_is_told_and_its_text_is_checked_first() {
    let home = tempfile::tempdir().unwrap();
    let out = home.path().join("made");
    let short = home.path().join("short.txt");
    std::fs::write(&short, "Too short.").unwrap();
    let quantize = |text: &str| {
        let fixed = ["quantize", TINY_GGUF, out.to_str().unwrap(), "--quantize", "int4", "--calibrate", text];
        run(&[&fixed[..], &["--ctx-size", "32", "--chunks", "2", "--json"]].concat())
    };
    let ended = quantize("no-such-file");
    assert!(ended.code == 1 && ended.stderr.contains("cannot read no-such-file"), "{}", ended.stderr);
    let ended = quantize(short.to_str().unwrap());
    assert!(ended.code == 1 && ended.stderr.contains("two windows of 32 need 64"), "{}", ended.stderr);
    assert!(!out.exists());
    let ended = quantize(PROSE);
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    let report: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert!(report["calibration_seconds"].as_f64().unwrap() > 0.0, "{report}");
    let total = &report["total"];
    let bits = total["bytes"].as_f64().unwrap() * 8.0 / total["parameters"].as_f64().unwrap();
    assert!((bits - total["bits_per_weight"].as_f64().unwrap()).abs() < 1e-9, "{report}");
    // Some bytes of header, the rest is what is reported.
    let file = std::fs::metadata(out.join("model.safetensors")).unwrap().len();
    assert!((0..20_000).contains(&(file - total["bytes"].as_u64().unwrap())), "{file} {report}");
}

#[test]
fn bits_are_kept_to_and_too_few_are_refused_with_what_would_do() {
    let home = tempfile::tempdir().unwrap();
    let out = home.path().join("made");
    let quantize = |bits: &str| {
        let fixed = ["quantize", TINY_GGUF, out.to_str().unwrap(), "--quantize", "int4", "--bits-per-weight", bits];
        run(&[&fixed[..], &["--json"]].concat())
    };
    let ended = quantize("4.5");
    let says_least = ended.stderr.contains("4.5 bits a weight were asked for, and the smallest formats take ");
    assert!(ended.code == 1 && says_least && !out.exists(), "{}", ended.stderr);
    let ended = quantize("7.5");
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    let report: Value = serde_json::from_str(&ended.stdout).unwrap();
    let bits = report["total"]["bits_per_weight"].as_f64().unwrap();
    assert!((7.0..=7.5).contains(&bits), "{report}");
    let out = out.to_str().unwrap();
    assert!(perplexity(out, &[]).is_finite());
}

#[test]
fn wrong_usage_is_code_2() {
    for arguments in [
        &["quantize", TINY_LLAMA][..],
        &["quantize", TINY_LLAMA, "out"],
        &["quantize", TINY_LLAMA, "out", "--quantize", "none"],
        &["quantize", TINY_LLAMA, "out", "--quantize", "int4", "--chunks", "3"],
        &["quantize", TINY_LLAMA, "out", "--quantize", "int4", "--bits-per-weight", "3"],
        &["quantize", TINY_LLAMA, "out", "--quantize", "int8", "--bits-per-weight", "6"],
    ] {
        assert_eq!(run(arguments).code, 2, "{arguments:?}");
    }
    assert!(!Path::new("out").exists());
}
