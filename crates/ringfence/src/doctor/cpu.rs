//! The host's CPU.

use std::fs;
use std::thread;

use super::Finding;

/// Flags of `/proc/cpuinfo` that each level of the x86-64 psABI adds.
const LEVELS: [(&str, &[&str]); 3] = [
    ("x86-64-v2", &["cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"]),
    ("x86-64-v3", &["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"]),
    ("x86-64-v4", &["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"]),
];

/// Features worth a line: name, flags, and what their absence means.
const FEATURES: [(&str, &[&str], &str); 4] = [
    ("AVX2", &["avx2"], "guests cannot use it either: --cpu x86-64-v2"),
    ("AVX-512", &["avx512f"], "guests cannot use it either"),
    ("AES, PCLMUL", &["aes", "pclmulqdq"], "guests encrypt in software"),
    ("invariant TSC", &["constant_tsc", "nonstop_tsc"], "guests do not get one either"),
];

/// `AT_HWCAP2` bit 1: user programs may use RDFSBASE and its like (Linux, asm/hwcap2.h).
const HWCAP2_FSGSBASE: usize = 1 << 1;

pub(super) fn findings() -> Vec<Finding> {
    const TOPIC: &str = "CPU";
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name| field(&text, name).unwrap_or("unknown");
    let flags: Vec<&str> = field("flags").split_whitespace().collect();
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let mut findings = vec![
        Finding::info(TOPIC, "model", format!("{} ({})", field("model name"), field("vendor_id"))),
        Finding::info(TOPIC, "usable cores", cores.to_string()),
        Finding::info(TOPIC, "level", level(&flags)),
    ];
    for (name, needed, hint) in FEATURES {
        let there = needed.iter().all(|flag| flags.contains(flag));
        findings.push(Finding::check(TOPIC, name, there, yes(there), hint));
    }
    let fsgsbase = rustix::param::linux_hwcap().1 & HWCAP2_FSGSBASE != 0;
    findings.push(Finding::check(
        TOPIC,
        "FSGSBASE",
        fsgsbase,
        yes(fsgsbase),
        "a kernel older than 5.9, or nofsgsbase",
    ));
    let virtual_host = flags.contains(&"hypervisor");
    findings.push(Finding::info(TOPIC, "itself virtual", yes(virtual_host)));
    findings
}

pub(super) fn yes(there: bool) -> &'static str {
    if there { "yes" } else { "no" }
}

fn field<'a>(cpuinfo: &'a str, name: &str) -> Option<&'a str> {
    let mut fields = cpuinfo.lines().filter_map(|line| line.split_once(':'));
    fields.find(|(key, _)| key.trim() == name).map(|(_, value)| value.trim())
}

/// The highest level of which every flag is there.
fn level(flags: &[&str]) -> &'static str {
    let reached = LEVELS.iter().take_while(|(_, needed)| needed.iter().all(|flag| flags.contains(flag)));
    reached.last().map_or("x86-64 (v1)", |(name, _)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn level_needs_every_flag_below_it() {
        let v2 = LEVELS[0].1.to_vec();
        assert_eq!(level(&v2), "x86-64-v2");
        assert_eq!(level(&[v2.clone(), LEVELS[1].1.to_vec()].concat()), "x86-64-v3");
        assert_eq!(level(&[v2, LEVELS[2].1.to_vec()].concat()), "x86-64-v2");
        assert_eq!(level(&[]), "x86-64 (v1)");
    }

    #[test]
    fn first_processor_counts() {
        let text = "processor\t: 0\nmodel name\t: A: B\n\nprocessor\t: 1\nmodel name\t: C\n";
        assert_eq!(field(text, "model name"), Some("A: B"));
        assert_eq!(field(text, "stepping"), None);
    }
}
