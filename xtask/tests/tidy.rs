//! Rules of the house that the compiler cannot check. Each is an ordinary test, so that a broken rule is a failed test.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Asked for where it runs: a binary that another checkout built may be taken for this one's.
fn root() -> PathBuf {
    let own = std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    own.parent().unwrap().to_path_buf()
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn files(folder: &Path, extension: &str, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() {
            if name != "target" && !name.starts_with('.') {
                files(&path, extension, found);
            }
        } else if path.extension().is_some_and(|found| found == extension) {
            found.push(path);
        }
    }
}

fn rust_files() -> Vec<PathBuf> {
    let mut found = Vec::new();
    files(&root(), "rs", &mut found);
    found.sort();
    assert!(found.len() > 50, "the walk found only {} files", found.len());
    found
}

/// Dependencies of ours, by crate: `[dependencies]` only.
fn arrows() -> BTreeMap<String, BTreeSet<String>> {
    let mut manifests = vec!["kernels/Cargo.toml".to_owned()];
    for entry in fs::read_dir(root().join("crates")).unwrap() {
        manifests.push(format!("crates/{}/Cargo.toml", entry.unwrap().file_name().to_string_lossy()));
    }
    manifests
        .iter()
        .map(|manifest| {
            let table: toml::Table = read(manifest).parse().unwrap();
            let name = table["package"]["name"].as_str().unwrap().to_owned();
            let ours = table
                .get("dependencies")
                .and_then(|value| value.as_table())
                .map(|dependencies| dependencies.keys().filter(|key| key.starts_with("bindery-")).cloned().collect())
                .unwrap_or_default();
            (name, ours)
        })
        .collect()
}

#[test]
fn every_source_file_says_why_it_exists() {
    for path in rust_files() {
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("//!"), "{} does not open with `//!`", path.display());
    }
}

#[test]
fn architecture_names_every_crate_and_top_folder() {
    let text = read("ARCHITECTURE.md");
    let mut names: Vec<String> = arrows().into_keys().collect();
    for entry in fs::read_dir(root()).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.path().is_dir() && !name.starts_with('.') && name != "target" && name != "shared" {
            names.push(format!("{name}/"));
        }
    }
    for name in names {
        let short = name.strip_prefix("bindery-").unwrap_or(&name);
        assert!(text.contains(short), "ARCHITECTURE.md does not name {short}");
    }
}

#[test]
fn arrows_between_crates_are_those_of_the_architecture() {
    let allowed: BTreeMap<&str, &[&str]> = BTreeMap::from([
        ("bindery-protocol", &[] as &[&str]),
        ("bindery-scheduler", &[]),
        ("bindery-kernels", &[]),
        ("bindery-hub", &[]),
        ("bindery-gateway", &["bindery-protocol"]),
        ("bindery-model", &["bindery-kernels"]),
        ("bindery-engine", &["bindery-scheduler", "bindery-model"]),
        ("bindery-server", &["bindery-protocol", "bindery-engine", "bindery-gateway"]),
        (
            "bindery",
            &[
                "bindery-protocol",
                "bindery-hub",
                "bindery-model",
                "bindery-engine",
                "bindery-gateway",
                "bindery-server",
            ],
        ),
    ]);
    for (name, ours) in arrows() {
        let allowed = allowed
            .get(name.as_str())
            .unwrap_or_else(|| panic!("{name} has no row: add it here and in ARCHITECTURE.md"));
        for dependency in ours {
            assert!(
                allowed.contains(&dependency.as_str()),
                "{name} -> {dependency} is a new arrow: ARCHITECTURE.md first"
            );
        }
    }
}

#[test]
fn ci_runs_exactly_the_readme_test_command() {
    let ci = read(".ci/run");
    let last = ci.lines().rev().find(|line| !line.trim().is_empty()).unwrap();
    let command = last.strip_prefix("exec ").unwrap();
    assert!(read("README.md").contains(command), "README.md does not show `{command}`");
}

/// The Rust version that we promise compiles what is locked, too; packages of other platforms are fetched for it.
#[test]
fn no_locked_package_needs_a_newer_rust_than_we_say() {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut metadata = std::process::Command::new(cargo);
    metadata.args(["metadata", "--format-version", "1", "--locked"]).current_dir(root());
    let output = metadata.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let version = |text: &str| -> Vec<u32> { text.split('.').map(|part| part.parse().unwrap()).collect() };
    let ours: toml::Table = read("Cargo.toml").parse().unwrap();
    let ours = version(ours["workspace"]["package"]["rust-version"].as_str().unwrap());
    for package in metadata["packages"].as_array().unwrap() {
        if let Some(theirs) = package["rust_version"].as_str() {
            assert!(version(theirs)[..2] <= ours[..], "{} needs Rust {theirs}", package["name"]);
        }
    }
}

#[test]
fn python_packages_are_pinned() {
    for line in read("tests/system/requirements.txt").lines() {
        if !line.is_empty() && !line.starts_with('#') {
            assert!(line.contains("=="), "{line} is not pinned");
        }
    }
}

#[test]
fn no_test_is_ignored_and_no_work_is_left_in_comments() {
    for path in rust_files() {
        if path.ends_with("tidy.rs") {
            continue;
        }
        let text = fs::read_to_string(&path).unwrap();
        for forbidden in ["#[ignore", "todo!(", "unimplemented!(", "// TODO", "// FIXME", "SKELETON"] {
            assert!(!text.contains(forbidden), "{} contains {forbidden}", path.display());
        }
    }
}

#[test]
fn unsafe_code_lives_where_the_architecture_says() {
    for path in rust_files() {
        let relative = path.strip_prefix(root()).unwrap().to_string_lossy().replace('\\', "/");
        let exempt = relative.starts_with("kernels/")
            || relative == "crates/model/src/weights/mmap.rs"
            || relative.ends_with("tidy.rs");
        let text = fs::read_to_string(&path).unwrap();
        let has_unsafe = text.lines().any(|line| {
            let code = line.split("//").next().unwrap_or("");
            code.contains("unsafe {") || code.contains("unsafe fn") || code.contains("unsafe impl")
        });
        assert!(exempt || !has_unsafe, "{relative} has unsafe code");
    }
}
