//! `models inspect`: its page and its JSON against the headers of the files, read here; what it refuses.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};

use crate::support::{Ended, TINY_LLAMA, bindery, run};

fn checkpoint(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/checkpoints").join(name)
}

fn inspected(path: &Path, flags: &[&str]) -> Value {
    let fixed = ["models", "inspect", path.to_str().unwrap(), "--json"];
    let ended = run(&[&fixed, flags].concat());
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    serde_json::from_str(&ended.stdout).unwrap()
}

/// Elements and bytes of a safetensors file's tensors whose name passes.
fn totals(folder: &Path, wanted: impl Fn(&str) -> bool) -> (u64, u64) {
    let bytes = fs::read(folder.join("model.safetensors")).unwrap();
    let (length, rest) = bytes.split_first_chunk().unwrap();
    let header: Value = serde_json::from_slice(&rest[..u64::from_le_bytes(*length) as usize]).unwrap();
    let tensors = header.as_object().unwrap().iter().filter(|(name, _)| *name != "__metadata__" && wanted(name));
    let number = |value: &Value| value.as_u64().unwrap();
    tensors.fold((0, 0), |(elements, bytes), (_, tensor)| {
        let count: u64 = tensor["shape"].as_array().unwrap().iter().map(number).product();
        let offsets = &tensor["data_offsets"];
        (elements + count, bytes + number(&offsets[1]) - number(&offsets[0]))
    })
}

fn sum_of(report: &Value, part: &str, figure: &str) -> u64 {
    let groups = report["tensors"].as_array().unwrap().iter().filter(|group| group["part"] == part);
    groups.map(|group| group[figure].as_u64().unwrap()).sum()
}

#[test]
fn a_mixture_is_told_as_its_config_and_its_files_have_it() {
    let folder = checkpoint("tiny-mixtral");
    let report = inspected(&folder, &[]);
    let config: Value = serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap();
    for (ours, theirs) in [
        ("architecture", "model_type"),
        ("num_layers", "num_hidden_layers"),
        ("hidden_size", "hidden_size"),
        ("num_heads", "num_attention_heads"),
        ("num_kv_heads", "num_key_value_heads"),
        ("intermediate_size", "intermediate_size"),
        ("vocab_size", "vocab_size"),
        ("max_position_embeddings", "max_position_embeddings"),
    ] {
        assert_eq!(report[ours], config[theirs], "{ours}");
    }
    let (all, bytes) = totals(&folder, |_| true);
    assert_eq!((&report["parameters"], &report["stored_bytes"]), (&all.into(), &bytes.into()));
    let is_expert = |name: &str| name.contains(".experts.");
    let experts = totals(&folder, is_expert);
    assert!(experts.0 > 0);
    assert_eq!((sum_of(&report, "experts", "parameters"), sum_of(&report, "experts", "stored_bytes")), experts);
    let number = |key: &str| config[key].as_u64().unwrap();
    let chosen = experts.0 / number("num_local_experts") * number("num_experts_per_tok");
    assert_eq!(report["active_parameters"], all - experts.0 + chosen);
    let embedding = totals(&folder, |name| name.contains("embed_tokens"));
    assert_eq!((sum_of(&report, "embedding", "parameters"), sum_of(&report, "embedding", "stored_bytes")), embedding);
}

#[test]
fn requests_take_the_cache_that_their_blocks_take() {
    let report = inspected(&checkpoint("tiny-mixtral"), &["--num-requests", "3", "--length", "33"]);
    let number = |key: &str| report[key].as_u64().unwrap();
    let elements = 2 * number("num_layers") * number("num_kv_heads") * number("head_dim");
    let scales = 2 * number("num_layers") * number("num_kv_heads") * number("head_dim").div_ceil(32);
    let expected =
        json!({"f32": 4 * elements, "f16": 2 * elements, "bf16": 2 * elements, "int8": elements + 2 * scales});
    assert_eq!(report["kv_bytes_per_token"], expected);
    assert_eq!(report["kv_cache_dtype"], "f16");
    // Blocks of 16 tokens.
    let kv_bytes = 3 * 48 * 2 * elements;
    let needs = &report["needs"];
    assert_eq!(
        (&needs["num_requests"], &needs["length"], &needs["kv_bytes"]),
        (&3.into(), &33.into(), &kv_bytes.into())
    );
    let total = number("weight_bytes") + kv_bytes + needs["margin_bytes"].as_u64().unwrap();
    assert_eq!(needs["total_bytes"], total);
    let other = inspected(&checkpoint("tiny-mixtral"), &["--kv-cache-dtype", "int8", "--length", "33"]);
    assert_eq!(other["needs"]["kv_bytes"], 8 * 48 * (elements + 2 * scales));

    // A machine on which the tests run holds some requests of such a model.
    let fits = &report["fits"];
    assert_eq!(fits["num_requests"], 256, "{report}");
    assert_eq!(fits["kv_tokens"], fits["kv_blocks"].as_u64().unwrap() * 16);
    assert_eq!(fits["max_model_len"], report["max_position_embeddings"]);
}

#[test]
fn options_change_what_is_served_and_not_what_is_stored() {
    let folder = checkpoint("tiny-llama");
    let stored = inspected(&folder, &[]);
    let served = |flags: &[&str]| {
        let report = inspected(&folder, flags);
        assert_eq!(report["stored_bytes"], stored["stored_bytes"]);
        (report["tensors"][1]["served_as"].clone(), report["weight_bytes"].as_u64().unwrap())
    };
    let (as_stored, whole) = served(&[]);
    assert_eq!(as_stored, "as stored");
    let (int8, in_int8) = served(&["--quantize", "int8"]);
    let (int4, in_int4) = served(&["--quantize", "int4"]);
    let (f32, in_f32) = served(&["--dtype", "f32"]);
    assert_eq!((int8, int4, f32), ("int8".into(), "int4".into(), "f32".into()));
    assert!(in_int4 < in_int8 && in_int8 < whole && whole < in_f32, "{in_int4} {in_int8} {whole} {in_f32}");
    let reference = inspected(&folder, &["--backend", "reference"]);
    assert_eq!(reference["weight_bytes"], 4 * stored["parameters"].as_u64().unwrap());
    assert_eq!(reference["kv_bytes_per_token"].as_object().unwrap().len(), 1);
    // Of a folder whose weights are not here.
    let config = tempfile::tempdir().unwrap();
    fs::copy(folder.join("config.json"), config.path().join("config.json")).unwrap();
    let made_up = inspected(config.path(), &["--load-format", "dummy"]);
    assert_eq!(made_up["parameters"], stored["parameters"]);
}

/// Of every checkpoint: sizes in the table are those of the JSON, and nothing is wider than a terminal.
#[test]
fn the_page_is_for_people() {
    let mut folders: Vec<PathBuf> = Vec::new();
    for parent in ["checkpoints", "quantized"] {
        let parent = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests").join(parent);
        let entries = fs::read_dir(parent).unwrap().map(|entry| entry.unwrap().path());
        folders.extend(entries.filter(|path| path.join("config.json").exists()));
    }
    assert!(folders.len() > 30);
    for folder in folders {
        let ended = run(&["models", "inspect", folder.to_str().unwrap()]);
        assert_eq!((ended.code, ended.stderr.as_str()), (0, ""), "{}", folder.display());
        let name = folder.file_name().unwrap().to_str().unwrap();
        assert_eq!(ended.stdout.lines().next(), Some(name));
        for line in ended.stdout.lines().filter(|line| !line.starts_with("file ")) {
            assert!(line.chars().count() <= 80, "{name}: {line}");
        }
    }
    for (name, expected) in [
        ("tiny-mixtral", &["experts    ", " a token", "router "][..]),
        ("tiny-llama31", &["llama3 scaling by 8"]),
        ("tiny-qwen25-yarn", &["YaRN by "]),
        ("tiny-phi4-mini", &["longrope", "elements"]),
        ("tiny-gemma3", &["a window of ", "layers with a window keep all tokens, too", "linear scaling by "]),
        ("tiny-falcon-rw", &["ALiBi", "layer norms"]),
        ("tiny-smollm3", &["none in "]),
        ("tiny-llama-dynamic", &["dynamic scaling by "]),
    ] {
        let page = run(&["models", "inspect", checkpoint(name).to_str().unwrap(), "--quantize", "int4"]).stdout;
        for expected in expected {
            assert!(page.contains(expected), "{name}: {expected}: {page}");
        }
        let report = inspected(&checkpoint(name), &["--quantize", "int4"]);
        let all = page.lines().find(|line| line.starts_with("all ")).unwrap();
        for figure in ["stored_bytes", "weight_bytes"] {
            let size = bytesize::ByteSize::b(report[figure].as_u64().unwrap()).display().si().to_string();
            assert!(all.contains(&size), "{name}: {size} in {all}");
        }
    }
}

#[test]
fn a_cached_card_is_inspected_by_its_name_and_never_fetched() {
    let home = tempfile::tempdir().unwrap();
    let gguf = fs::read_dir(checkpoint("tiny-llama"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.extension().is_some_and(|extension| extension == "gguf"))
        .unwrap();
    fs::create_dir(home.path().join("cards")).unwrap();
    let card = format!(
        "name = \"toy\"\ntitle = \"Toy\"\narchitecture = \"llama\"\nparameters = 1\ncontext = 8\nlicense = \"MIT\"\n\
         [file]\nname = \"toy.gguf\"\nsize = {}\nsha256 = \"{}\"\n\
         [[sources]]\nkind = \"hub\"\nrepo = \"org/repo\"\nfile = \"toy.gguf\"\n",
        fs::metadata(&gguf).unwrap().len(),
        "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"
    );
    fs::write(home.path().join("cards/toy.toml"), card).unwrap();
    let go = |arguments: &[&str]| Ended::from(bindery(home.path()).args(arguments).output().unwrap());
    let missing = go(&["models", "inspect", "toy"]);
    assert_eq!((missing.code, missing.stdout.as_str()), (1, ""));
    assert_eq!(missing.stderr, "error: toy is not on this machine\nhint: fetch it: bindery pull toy\n");

    let cached = home.path().join("cache/models/toy/toy.gguf");
    fs::create_dir_all(cached.parent().unwrap()).unwrap();
    fs::copy(gguf, &cached).unwrap();
    let page = go(&["models", "inspect", "toy"]);
    assert_eq!(page.code, 0, "{}", page.stderr);
    assert!(page.stdout.starts_with(&format!("toy\n\nfile       {}\n", cached.display())), "{}", page.stdout);
    let by_variable = bindery(home.path()).args(["models", "inspect"]).env("BINDERY_MODEL", "toy").output().unwrap();
    assert_eq!(Ended::from(by_variable).stdout.lines().next(), Some("toy"));
}

#[test]
fn what_cannot_be_inspected_says_why() {
    let home = tempfile::tempdir().unwrap();
    fs::write(home.path().join("broken.gguf"), b"GGUF but not really").unwrap();
    for (arguments, code, expected) in [
        (&["broken.gguf"][..], 1, "cannot inspect broken.gguf"),
        (&["."], 1, "the folder . "),
        (&["no-such.gguf"], 1, "there is no file or folder no-such.gguf"),
        (&["smolm2"], 1, "there is no model card named `smolm2`"),
        (&["org/repo"], 1, "org/repo is not on this machine"),
        (&[TINY_LLAMA, "--length", "100000"], 1, "--length is 100000; this model takes 1 to 256 tokens"),
        (&[TINY_LLAMA, "--length", "0"], 2, "'--length <TOKENS>'"),
        (&[TINY_LLAMA, "--num-requests", "0"], 2, "'--num-requests <N>'"),
        (&[TINY_LLAMA, "--quantize", "int3"], 2, "--quantize"),
        (&[TINY_LLAMA, "--backend", "reference", "--quantize", "int4"], 2, "leave --quantize away"),
    ] {
        let mut command = bindery(home.path());
        let ended = Ended::from(command.args(["models", "inspect"]).args(arguments).output().unwrap());
        assert_eq!((ended.code, ended.stdout.as_str()), (code, ""), "{arguments:?}: {}", ended.stderr);
        assert!(ended.stderr.contains(expected), "{arguments:?}: {}", ended.stderr);
    }
}
