//! How much memory this process may still take: what the KV cache is sized by.
//!
//! The least of what the kernel calls available, what every control group above this process leaves, and what
//! `ulimit -v` leaves. It knows the system's files, no cache and no model. Invariant: reading fails towards the
//! smaller figure, never towards a larger one.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// Believed where the system does not say (no /proc/meminfo): small enough for any machine that can load a model.
const UNKNOWN_BYTES: u64 = 2 << 30;

/// A control group without a limit shows a number near 2^63 (version 1).
const UNLIMITED_BYTES: u64 = 1 << 60;

/// Bytes that this process can take without swapping or being killed, now. A snapshot: others allocate too, so the
/// caller keeps a margin.
pub fn available_memory_bytes() -> u64 {
    available_under(Path::new("/"))
}

/// The same from a file tree, so that tests can bring their own.
fn available_under(root: &Path) -> u64 {
    let system = fs::read_to_string(root.join("proc/meminfo"))
        .ok()
        .and_then(|text| field_kib(&text, "MemAvailable:"))
        .unwrap_or(UNKNOWN_BYTES);
    let groups = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let groups = groups.lines().filter_map(|line| group_headroom(root, line));
    groups.chain(address_space_headroom(root)).fold(system, u64::min)
}

/// What a line of /proc/self/cgroup leaves: the least over the group and all its parents.
fn group_headroom(root: &Path, line: &str) -> Option<u64> {
    let mut fields = line.splitn(3, ':');
    let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
    let (mount, files) = if controllers.is_empty() {
        (root.join("sys/fs/cgroup"), GroupFiles::V2)
    } else if controllers.split(',').any(|controller| controller == "memory") {
        (root.join("sys/fs/cgroup/memory"), GroupFiles::V1)
    } else {
        return None;
    };
    // Inside a container the path may name a folder that is not mounted here; its parents up to the mount still count.
    let mut folder: PathBuf = mount.clone();
    folder.extend(Path::new(path).components().filter(|part| matches!(part, std::path::Component::Normal(_))));
    folder
        .ancestors()
        .take_while(|ancestor| ancestor.starts_with(&mount))
        .filter_map(|folder| files.headroom(folder))
        .min()
}

#[derive(Clone, Copy)]
enum GroupFiles {
    V1,
    V2,
}

impl GroupFiles {
    fn headroom(self, folder: &Path) -> Option<u64> {
        let (limit, usage, reclaimable) = match self {
            Self::V1 => ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "),
            Self::V2 => ("memory.max", "memory.current", "inactive_file "),
        };
        let number = |name: &str| fs::read_to_string(folder.join(name)).ok()?.trim().parse::<u64>().ok();
        // "max" is no number: no limit here.
        let limit = number(limit).filter(|&limit| limit < UNLIMITED_BYTES)?;
        let usage = number(usage).unwrap_or(limit);
        let cached_pages = fs::read_to_string(folder.join("memory.stat"))
            .ok()
            .and_then(|text| text.lines().find_map(|line| line.strip_prefix(reclaimable)?.trim().parse::<u64>().ok()))
            .unwrap_or(0);
        Some(limit.saturating_sub(usage.saturating_sub(cached_pages)))
    }
}

/// `ulimit -v` less what is mapped already.
fn address_space_headroom(root: &Path) -> Option<u64> {
    let limits = fs::read_to_string(root.join("proc/self/limits")).ok()?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max address space"))?;
    let limit = line.split_whitespace().next()?.parse::<u64>().ok()?;
    let status = fs::read_to_string(root.join("proc/self/status")).ok()?;
    Some(limit.saturating_sub(field_kib(&status, "VmSize:")?))
}

/// "MemAvailable:   123 kB" to bytes.
fn field_kib(text: &str, name: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(name))?;
    value.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn check(files: &[(&str, &str)], expected: u64) {
        let root = tempfile::tempdir().unwrap();
        for (path, content) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        assert_eq!(available_under(root.path()), expected, "{files:?}");
    }

    const MEMINFO: (&str, &str) = ("proc/meminfo", "MemTotal: 16777216 kB\nMemAvailable:    8388608 kB\n");

    #[test]
    fn without_limits_it_is_what_the_kernel_says() {
        check(&[MEMINFO], 8192 * MIB);
        check(&[], UNKNOWN_BYTES);
        check(&[MEMINFO, ("proc/self/cgroup", "0::/\n"), ("sys/fs/cgroup/memory.max", "max\n")], 8192 * MIB);
    }

    #[test]
    fn the_tightest_group_above_the_process_counts() {
        check(
            &[
                MEMINFO,
                ("proc/self/cgroup", "0::/pod/app\n"),
                ("sys/fs/cgroup/pod/memory.max", "1073741824\n"),
                ("sys/fs/cgroup/pod/memory.current", "536870912\n"),
                ("sys/fs/cgroup/pod/memory.stat", "anon 1\ninactive_file 104857600\n"),
                ("sys/fs/cgroup/pod/app/memory.max", "max\n"),
            ],
            612 * MIB,
        );
    }

    #[test]
    fn version_1_groups_and_groups_not_mounted_here_count() {
        check(
            &[
                MEMINFO,
                ("proc/self/cgroup", "5:cpu:/\n4:memory:/docker/abc\n"),
                ("sys/fs/cgroup/memory/memory.limit_in_bytes", "1073741824\n"),
                ("sys/fs/cgroup/memory/memory.usage_in_bytes", "1063256064\n"),
            ],
            10 * MIB,
        );
        check(
            &[
                MEMINFO,
                ("proc/self/cgroup", "4:memory:/\n"),
                ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
            ],
            8192 * MIB,
        );
    }

    #[test]
    fn a_group_beyond_its_limit_leaves_nothing() {
        check(
            &[
                MEMINFO,
                ("proc/self/cgroup", "0::/\n"),
                ("sys/fs/cgroup/memory.max", "1000\n"),
                ("sys/fs/cgroup/memory.current", "2000\n"),
            ],
            0,
        );
    }

    #[test]
    fn an_address_space_limit_counts() {
        check(
            &[
                MEMINFO,
                ("proc/self/limits", "Limit  Soft  Hard\nMax address space   1073741824   unlimited   bytes\n"),
                ("proc/self/status", "Name: x\nVmSize:  524288 kB\n"),
            ],
            512 * MIB,
        );
        check(&[MEMINFO, ("proc/self/limits", "Max address space   unlimited   unlimited   bytes\n")], 8192 * MIB);
    }

    #[test]
    fn this_machine_has_memory() {
        assert!(available_memory_bytes() > 0);
    }
}
