//! How large the machine's last caches are: what is timed as memory must not fit them.
//!
//! It knows the system's files, no pool and no model. Invariant: what the system does not say is `None`, never a guess.

use std::{collections::BTreeMap, fs, path::Path};

/// Bytes of all last-level caches together, whether or not this process may run on the cores that they belong to: cores
/// find lines in each other's.
pub(crate) fn last_level_bytes() -> Option<usize> {
    last_level_under(Path::new("/"))
}

/// The same from a file tree, so that tests can bring their own.
fn last_level_under(root: &Path) -> Option<usize> {
    // Each cache once, by the CPUs that share it; of a CPU's caches the one with the highest level.
    let mut caches = BTreeMap::new();
    for cpu in fs::read_dir(root.join("sys/devices/system/cpu")).ok()?.flatten() {
        let Ok(of_cpu) = fs::read_dir(cpu.path().join("cache")) else {
            continue;
        };
        let read = |cache: &Path, file| fs::read_to_string(cache.join(file)).ok();
        let levels = of_cpu.flatten().filter_map(|cache| {
            let level: u32 = read(&cache.path(), "level")?.trim().parse().ok()?;
            Some((level, cache.path()))
        });
        if let Some((_, last)) = levels.max() {
            caches.insert(read(&last, "shared_cpu_list")?, bytes(&read(&last, "size")?)?);
        }
    }
    (!caches.is_empty()).then(|| caches.values().fold(0, |sum: usize, &bytes| sum.saturating_add(bytes)))
}

/// "32768K" to bytes.
fn bytes(size: &str) -> Option<usize> {
    let size = size.trim();
    let (digits, unit) = size.split_at(size.find(|c: char| !c.is_ascii_digit()).unwrap_or(size.len()));
    let unit = match unit {
        "" => 1,
        "K" => 1 << 10,
        "M" => 1 << 20,
        "G" => 1 << 30,
        _ => return None,
    };
    digits.parse::<usize>().ok()?.checked_mul(unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each CPU's caches as level, size and who shares it.
    fn check(cpus: &[&[(&str, &str, &str)]], expected: Option<usize>) {
        let root = tempfile::tempdir().unwrap();
        for (cpu, caches) in cpus.iter().enumerate() {
            for (index, (level, size, shared)) in caches.iter().enumerate() {
                let folder = root.path().join(format!("sys/devices/system/cpu/cpu{cpu}/cache/index{index}"));
                fs::create_dir_all(&folder).unwrap();
                for (file, text) in [("level", level), ("size", size), ("shared_cpu_list", shared)] {
                    fs::write(folder.join(file), format!("{text}\n")).unwrap();
                }
            }
        }
        assert_eq!(last_level_under(root.path()), expected, "{cpus:?}");
    }

    #[test]
    fn each_last_cache_counts_once_and_lower_levels_do_not() {
        let (first, second) = ([("1", "48K", "0"), ("3", "32M", "0-1")], [("1", "48K", "1"), ("3", "32M", "0-1")]);
        check(&[&first, &second], Some(32 << 20));
        check(&[&first, &second, &[("3", "98304K", "2-3"), ("2", "1M", "2")]], Some(128 << 20));
        check(&[&[("2", "512", "0")], &[("2", "512", "1")]], Some(1024));
    }

    #[test]
    fn what_the_system_does_not_say_is_not_guessed() {
        check(&[], None);
        check(&[&[("3", "", "0")]], None);
        check(&[&[("2", "1M", "0"), ("3", "", "0-1")]], None);
        check(&[&[("3", "32 apples", "0")], &[("three", "32M", "1")]], None);
        check(&[&[("3", "99999999999999999999K", "0")]], None);
        check(&[&[("3", "18446744073709551615K", "0")]], None);
    }
}
