//! Every family through the public route: token ids in, `echo` and `logprobs` out, held to what transformers computed.
//!
//! It reads the goldens of tests/golden and knows nothing else of the models. Invariant: whatever folder of
//! tests/checkpoints holds a checkpoint or its GGUF twin is served and asked.

use std::{
    fs,
    path::{Path, PathBuf},
};

use reqwest::StatusCode;
use serde_json::{Value, json};

use crate::serving::Serving;

/// Log-probabilities in f32 on the `cpu` backend.
const TOLERANCE: f64 = 5e-3;
/// As many as the route gives.
const NUM_TOP: usize = 5;
/// Steps of a few tokens: longer prompts are computed in chunks.
const FLAGS: [&str; 4] = ["--dtype", "f32", "--max-num-batched-tokens", "24"];

fn checkpoints() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/checkpoints")
}

/// Folders with this file, sorted.
fn folders_with(file: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(checkpoints()).unwrap().map(|entry| entry.unwrap().path());
    let mut folders: Vec<_> = entries.filter(|path| path.join(file).exists()).collect();
    folders.sort();
    assert!(!folders.is_empty(), "no folder with {file}");
    folders
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
}

fn ids(value: &Value) -> Vec<u64> {
    value.as_array().unwrap().iter().map(|number| number.as_u64().unwrap()).collect()
}

/// What a GGUF file of the checkpoint says of its context. (Of a folder more may be served: dynamic scaling reaches beyond.)
fn context(folder: &Path) -> usize {
    let config: Value = serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap();
    config["max_position_embeddings"].as_u64().unwrap() as usize
}

/// Asks for each golden prompt that fits the context, and returns what is wrong.
fn ask(serving: &Serving, golden: &Value, context: usize) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut num_asked = 0;
    for prompt in golden["prompts"].as_array().unwrap() {
        let name = prompt["name"].as_str().unwrap();
        let (tokens, greedy) = (ids(&prompt["tokens"]), ids(&prompt["greedy"]));
        let num_greedy = greedy.len().min(context.saturating_sub(tokens.len()));
        if num_greedy == 0 {
            continue;
        }
        num_asked += 1;
        let (status, answer) = serving.post(&json!({
            "prompt": tokens, "max_tokens": num_greedy, "temperature": 0, "ignore_eos": true,
            "echo": true, "logprobs": NUM_TOP, "return_tokens_as_token_ids": true,
        }));
        assert_eq!(status, StatusCode::OK, "{name}: {answer}");
        let logprobs = &answer["choices"][0]["logprobs"];
        let named: Vec<_> = tokens.iter().chain(&greedy[..num_greedy]).map(|id| format!("token_id:{id}")).collect();
        if logprobs["tokens"] != json!(named) {
            wrong.push(format!("{name}: tokens {} instead of {named:?}", logprobs["tokens"]));
            continue;
        }
        let told = logprobs["token_logprobs"].as_array().unwrap();
        assert_eq!((told.len(), &told[0]), (named.len(), &Value::Null), "{name}");
        let mut expected = numbers(&prompt["next_logprobs"]);
        expected.extend(&numbers(&prompt["greedy_logprobs"])[..num_greedy]);
        let distances = numbers(&json!(told[1..])).into_iter().zip(expected).map(|(a, b)| (a - b).abs());
        // The candidates at place p + 1 are those after the token at p.
        let rows = prompt["rows"].as_array().unwrap().iter();
        let tops = rows.flat_map(|row| {
            let candidates = &logprobs["top_logprobs"][row["position"].as_u64().unwrap() as usize + 1];
            row["top"].as_array().unwrap().iter().filter_map(move |top| {
                let told = candidates[format!("token_id:{}", top[0])].as_f64()?;
                Some((told - top[1].as_f64().unwrap()).abs())
            })
        });
        let distances: Vec<f64> = distances.chain(tops).collect();
        assert!(distances.len() > tokens.len(), "{name}: the candidates are compared too");
        let worst = distances.into_iter().fold(0.0, f64::max);
        if worst.is_nan() || worst >= TOLERANCE {
            wrong.push(format!("{name}: off by {worst:.2e}"));
        }
    }
    assert!(num_asked > 0, "no prompt fits {context} tokens");
    wrong
}

fn read_golden(folder: &Path, files: &[&str]) -> Value {
    let file = files.iter().map(|file| folder.join(file)).find(|path| path.exists()).unwrap();
    serde_json::from_slice(&fs::read(file).unwrap()).unwrap()
}

fn assert_none(wrong: &[String]) {
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn checkpoints_answer_as_transformers_does() {
    let mut wrong = Vec::new();
    for folder in folders_with("model.safetensors") {
        let served = tempfile::tempdir().unwrap();
        for file in ["config.json", "model.safetensors"] {
            fs::copy(folder.join(file), served.path().join(file)).unwrap();
        }
        fs::copy(checkpoints().join("tokenizer.json"), served.path().join("tokenizer.json")).unwrap();
        let serving = Serving::start_model(served.path(), &FLAGS);
        let errors = ask(&serving, &read_golden(&folder, &["golden.json"]), usize::MAX);
        wrong.extend(errors.into_iter().map(|error| format!("{}: {error}", folder.display())));
    }
    assert_none(&wrong);
}

#[test]
fn gguf_twins_answer_as_transformers_does() {
    let mut wrong = Vec::new();
    for folder in folders_with("model.gguf") {
        let serving = Serving::start_model(&folder.join("model.gguf"), &FLAGS);
        let errors = ask(&serving, &read_golden(&folder, &["golden-gguf.json", "golden.json"]), context(&folder));
        wrong.extend(errors.into_iter().map(|error| format!("{}: {error}", folder.display())));
    }
    assert_none(&wrong);
}
