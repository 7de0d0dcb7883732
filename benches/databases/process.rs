//! CPU time and memory of processes, from /proc.

use std::path::Path;

/// `USER_HZ`, which is 100 on every Linux that PostgreSQL runs on.
const TICKS_PER_SECOND: f64 = 100.0;

/// CPU seconds of one process and of those of its children that have ended and were waited for.
pub fn cpu(pid: u32) -> f64 {
    stat(&Path::new("/proc").join(pid.to_string())).map_or(0.0, |stat| stat.seconds)
}

/// CPU seconds of a process and all its children, ended ones included.
pub fn cpu_of_tree(pid: u32) -> f64 {
    loop {
        let before = ended_children_of(pid);
        let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        let children = processes.filter_map(|entry| stat(&entry.path())).filter(|stat| stat.parent == pid);
        let seconds = children.map(|stat| stat.seconds).sum::<f64>() + cpu(pid);
        // A child that ended meanwhile was counted twice or not at all.
        if ended_children_of(pid) == before {
            return seconds;
        }
    }
}

fn ended_children_of(pid: u32) -> Option<u64> {
    // As ticks, which compare exactly.
    stat(&Path::new("/proc").join(pid.to_string())).map(|stat| (stat.ended_children * TICKS_PER_SECOND).round() as u64)
}

/// CPU seconds of programs that this one has started and that have ended.
pub fn cpu_of_ended_children() -> f64 {
    stat(Path::new("/proc/self")).map_or(0.0, |stat| stat.ended_children)
}

/// Largest resident memory that a process has had, in MiB.
pub fn peak_memory(pid: u32) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib: Option<f64> = line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok());
    kib.unwrap_or(0.0) / 1024.0
}

struct Stat {
    parent: u32,
    seconds: f64,
    ended_children: f64,
}

/// Reads `stat` (manual: proc(5)); the name in parentheses may hold anything.
fn stat(process: &Path) -> Option<Stat> {
    let text = std::fs::read_to_string(process.join("stat")).ok()?;
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
    let parent = fields.get(1)?.parse().ok()?;
    // utime, stime, cutime, cstime
    let seconds = |fields: &[&str]| fields.iter().filter_map(|field| field.parse::<f64>().ok()).sum::<f64>() / TICKS_PER_SECOND;
    Some(Stat { parent, seconds: seconds(fields.get(11..15)?), ended_children: seconds(fields.get(13..15)?) })
}
