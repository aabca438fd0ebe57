//! Hostile files cannot make the readers allocate more than a small multiple of their own size.
//!
//! A test binary of its own: it looks at the peak of the whole process's address space, which other tests would blur.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "weights/builder.rs"]
#[allow(dead_code, reason = "shared with the other test binary, which uses all of it")]
mod builder;

use bindery_model::weights::WeightStore;
use builder::{Gguf, config_json, model_folder, on_disk, value};

/// Peak of the address space so far, bytes: what was asked for counts, touched or not.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmPeak:")).unwrap();
    line.trim().trim_end_matches(" kB").trim().parse::<u64>().unwrap() * 1024
}

#[test]
fn announced_counts_allocate_nothing() {
    let before = peak();
    for bits in (20..64).step_by(4) {
        let count = 1u64 << bits;
        for count in [count - 1, count] {
            let mut files = vec![
                Gguf { num_tensors: Some(count), ..Gguf::llama() },
                Gguf { num_keys: Some(count), ..Gguf::llama() },
                Gguf::llama().key("text", [&8u32.to_le_bytes()[..], &count.to_le_bytes()].concat()),
            ];
            files.extend((0..13).map(|kind| Gguf::llama().key("array", value::array(kind, count, &[0; 64]))));
            for file in files {
                assert!(WeightStore::open(&on_disk("m.gguf", &file.bytes()).path).is_err());
            }
            let header = [&count.to_le_bytes()[..], &[b'{'; 64]].concat();
            assert!(WeightStore::open(model_folder(&config_json(), &header).path()).is_err());
        }
    }
    let grown = peak() - before;
    // The allocator may take an arena or two of 64 MiB.
    assert!(grown < 256 << 20, "{grown} bytes");
}
