//! What is freed in pages that hold a little else goes back to the system when it is asked to. One test, for others would
//! allocate beside it. (Emulators count their own memory.)
#![cfg(all(target_os = "linux", target_env = "gnu", target_arch = "x86_64", not(miri)))]
#![allow(clippy::unwrap_used, reason = "tests")]

/// Of this process, in KiB.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim_end_matches("kB").trim().parse().unwrap()
}

#[test]
fn what_is_freed_between_what_is_kept_goes_back_to_the_system() {
    const BLOCK_BYTES: usize = 512;
    const NUM_BLOCKS: usize = 1 << 18;
    const NUM_KIB: usize = NUM_BLOCKS * BLOCK_BYTES / 1024;
    // As a tokenizer's tables: one block of a hundred stays, the last among them.
    let mut blocks: Vec<Option<Vec<u8>>> = (0..NUM_BLOCKS).map(|i| Some(vec![i as u8; BLOCK_BYTES])).collect();
    let full = resident();
    for (index, block) in blocks.iter_mut().enumerate() {
        if !(NUM_BLOCKS - 1 - index).is_multiple_of(100) {
            *block = None;
        }
    }
    let freed = resident();
    assert!(full - freed.min(full) < NUM_KIB / 2, "the allocator keeps it: {full} KiB, {freed} after freeing");
    bindery_kernels::give_back_freed();
    let given_back = resident();
    assert!(given_back < full - NUM_KIB / 2, "{full} KiB, {freed} after freeing, {given_back} after giving back");
    assert!(blocks.iter().enumerate().all(|(i, block)| block.as_ref().is_none_or(|block| block[0] == i as u8)));
}
