//! How much memory this process may still take: what the KV cache is sized by. And how much it could ever have: what
//! can be asked of this machine at all.
//!
//! What is left is the least of what the kernel calls available, what every control group above this process leaves,
//! and what `ulimit -v` leaves. It knows the system's files, no cache and no model. Invariant: reading what is left fails
//! towards the smaller figure, never towards a larger one.

use std::{
    fs,
    path::{Path, PathBuf},
};

pub use bindery_kernels::give_back_freed;

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
    let groups = groups.lines().filter_map(|line| least_of_groups(root, line, GroupFiles::headroom));
    groups.chain(address_space_headroom(root)).fold(system, u64::min)
}

/// All the memory there is for this process, used or not, and whose figure that is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TotalMemory {
    /// The machine's, or the control group's where that is less.
    pub bytes: u64,
    /// A control group above this process has less than the machine.
    pub is_of_group: bool,
}

/// The most that this process can ever have; `None` where the system does not say. Swap does not count: a cache that
/// is swapped out is of no use.
pub fn total_memory() -> Option<TotalMemory> {
    total_under(Path::new("/"))
}

fn total_under(root: &Path) -> Option<TotalMemory> {
    let machine = fs::read_to_string(root.join("proc/meminfo")).ok().and_then(|text| field_kib(&text, "MemTotal:"))?;
    let groups = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let group = groups.lines().filter_map(|line| least_of_groups(root, line, GroupFiles::limit)).min();
    Some(match group.filter(|&group| group < machine) {
        Some(group) => TotalMemory { bytes: group, is_of_group: true },
        None => TotalMemory { bytes: machine, is_of_group: false },
    })
}

/// The least figure over the group that a line of /proc/self/cgroup names and all its parents.
fn least_of_groups(root: &Path, line: &str, figure: impl Fn(GroupFiles, &Path) -> Option<u64>) -> Option<u64> {
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
        .filter_map(|folder| figure(files, folder))
        .min()
}

#[derive(Clone, Copy)]
enum GroupFiles {
    V1,
    V2,
}

impl GroupFiles {
    /// `None`: no limit here.
    fn limit(self, folder: &Path) -> Option<u64> {
        let name = match self {
            Self::V1 => "memory.limit_in_bytes",
            Self::V2 => "memory.max",
        };
        // "max" is no number.
        number_in(&folder.join(name)).filter(|&limit| limit < UNLIMITED_BYTES)
    }

    fn headroom(self, folder: &Path) -> Option<u64> {
        let (usage, reclaimable) = match self {
            Self::V1 => ("memory.usage_in_bytes", "total_inactive_file "),
            Self::V2 => ("memory.current", "inactive_file "),
        };
        let limit = self.limit(folder)?;
        let usage = number_in(&folder.join(usage)).unwrap_or(limit);
        let cached_pages = fs::read_to_string(folder.join("memory.stat"))
            .ok()
            .and_then(|text| text.lines().find_map(|line| line.strip_prefix(reclaimable)?.trim().parse::<u64>().ok()))
            .unwrap_or(0);
        Some(limit.saturating_sub(usage.saturating_sub(cached_pages)))
    }
}

fn number_in(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
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

    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, content) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        root
    }

    fn check(files: &[(&str, &str)], expected: u64) {
        assert_eq!(available_under(tree(files).path()), expected, "{files:?}");
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
    fn the_total_is_the_machines_or_that_of_the_tightest_group() {
        let check = |files: &[(&str, &str)], expected: Option<(u64, bool)>| {
            let total = total_under(tree(files).path());
            assert_eq!(total.map(|total| (total.bytes, total.is_of_group)), expected, "{files:?}");
        };
        let group = ("proc/self/cgroup", "0::/pod/app\n");
        let machine = Some((16384 * MIB, false));
        check(&[], None);
        check(&[MEMINFO], machine);
        check(&[MEMINFO, group, ("sys/fs/cgroup/pod/app/memory.max", "max\n")], machine);
        // A limit above the machine's memory gives nobody more.
        check(&[MEMINFO, group, ("sys/fs/cgroup/pod/memory.max", "34359738368\n")], machine);
        let limits = [("sys/fs/cgroup/pod/memory.max", "1073741824\n"), ("sys/fs/cgroup/pod/app/memory.max", "max\n")];
        check(&[MEMINFO, group, limits[0], limits[1]], Some((1024 * MIB, true)));
        let (version_1, limit) = (("proc/self/cgroup", "4:memory:/\n"), "sys/fs/cgroup/memory/memory.limit_in_bytes");
        check(&[MEMINFO, version_1, (limit, "9223372036854771712\n")], machine);
        check(&[MEMINFO, version_1, (limit, "1073741824\n")], Some((1024 * MIB, true)));
    }

    #[test]
    fn this_machine_has_memory() {
        assert!(available_memory_bytes() > 0);
    }
}
