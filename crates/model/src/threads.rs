//! How many threads are worth having: physical cores that this process may run on.
//!
//! Two hyper-threads share one set of vector units, so a second thread on a core only adds waiting. It knows the
//! system's files, no pool and no model. Invariant: the answer is at least 1.

use std::{collections::BTreeSet, fs, path::Path};

/// CPU ids above this are not believed.
const MAX_CPU_ID: usize = 1 << 16;

/// Physical cores in this process's affinity mask, at most the cgroup's quota. Where the system does not say which
/// logical CPUs share a core (not Linux, or no /sys), the number of logical CPUs.
pub fn physical_cores() -> usize {
    let logical = std::thread::available_parallelism().map_or(1, usize::from);
    physical_cores_under(Path::new("/")).map_or(logical, |cores| cores.min(logical)).max(1)
}

/// The same from a file tree, so that tests can bring their own.
fn physical_cores_under(root: &Path) -> Option<usize> {
    let status = fs::read_to_string(root.join("proc/self/status")).ok()?;
    let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    let mut cores = BTreeSet::new();
    for cpu in parse_cpu_list(allowed)? {
        let path = root.join(format!("sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"));
        let siblings = parse_cpu_list(&fs::read_to_string(path).ok()?)?;
        // A core is known by the first of its hyper-threads, whether or not that one is in the mask.
        cores.insert(siblings.first().copied()?);
    }
    Some(cores.len())
}

/// "0-2,5" to 0, 1, 2, 5.
fn parse_cpu_list(text: &str) -> Option<BTreeSet<usize>> {
    let mut cpus = BTreeSet::new();
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (first.trim().parse::<usize>().ok()?, last.trim().parse::<usize>().ok()?);
        if first > last || last > MAX_CPU_ID {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(allowed: &str, siblings: &[&str]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("proc/self")).unwrap();
        fs::write(root.path().join("proc/self/status"), format!("Name:\tx\nCpus_allowed_list:\t{allowed}\n")).unwrap();
        for (cpu, list) in siblings.iter().enumerate() {
            let folder = root.path().join(format!("sys/devices/system/cpu/cpu{cpu}/topology"));
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("thread_siblings_list"), format!("{list}\n")).unwrap();
        }
        root
    }

    fn check(allowed: &str, siblings: &[&str], expected: Option<usize>) {
        assert_eq!(physical_cores_under(machine(allowed, siblings).path()), expected, "{allowed} of {siblings:?}");
    }

    #[test]
    fn hyper_threads_count_once_and_only_allowed_cpus_count() {
        check("0-3", &["0,2", "1,3", "0,2", "1,3"], Some(2));
        check("0-3", &["0-1", "0-1", "2-3", "2-3"], Some(2));
        check("0-1", &["0-1", "0-1", "2-3", "2-3"], Some(1));
        check("1,3", &["0-1", "0-1", "2-3", "2-3"], Some(2));
        check("0-3", &["0", "1", "2", "3"], Some(4));
    }

    #[test]
    fn what_cannot_be_read_is_no_answer() {
        check("0-7", &["0"], None);
        check("3-0", &["0"], None);
        check("0-99999999", &["0"], None);
        check("", &["0"], None);
        check("0", &["x"], None);
    }

    #[test]
    fn this_machine_has_a_core() {
        assert!(physical_cores() >= 1);
        assert!(physical_cores() <= std::thread::available_parallelism().unwrap().get());
    }
}
