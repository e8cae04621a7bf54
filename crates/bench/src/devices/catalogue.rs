//! What is measured: a table of tests, each on disks or on the network.

use crate::root::Kit;

/// What a figure counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    /// Operations a second.
    Operations,
    /// MiB a second.
    Mebibytes,
    /// Gbit a second.
    Gigabits,
    /// Microseconds: less is better.
    Microseconds,
}

impl Unit {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Operations => "op/s",
            Self::Mebibytes => "MiB/s",
            Self::Gigabits => "Gbit/s",
            Self::Microseconds => "us",
        }
    }

    /// How many times better `ours` is than `theirs`.
    pub(crate) fn times(self, ours: f64, theirs: f64) -> f64 {
        if self == Self::Microseconds { theirs / ours } else { ours / theirs }
    }
}

/// A test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Test {
    pub(crate) name: &'static str,
    pub(crate) unit: Unit,
}

const fn test(name: &'static str, unit: Unit) -> Test {
    Test { name, unit }
}

/// Of each disk: 4 KiB at random, one at a time and 32; 1 MiB in order, four at a time.
pub(crate) const DISK: &[Test] = &[
    test("randread-1", Unit::Operations),
    test("randwrite-1", Unit::Operations),
    test("randread-32", Unit::Operations),
    test("randwrite-32", Unit::Operations),
    test("read-1m", Unit::Mebibytes),
    test("write-1m", Unit::Mebibytes),
];

/// Of the network: one TCP connection's throughput each way, and round trips of one byte.
pub(crate) const NET: &[Test] = &[
    test("to-host", Unit::Gigabits),
    test("to-guest", Unit::Gigabits),
    test("tcp-1", Unit::Microseconds),
    test("udp-1", Unit::Microseconds),
];

/// A disk, or the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Device {
    /// Raw on virtio.
    Virtio,
    /// Raw on NVMe.
    Nvme,
    /// qcow2 on virtio.
    Qcow2,
    /// The network card, behind user networking.
    Net,
}

impl Device {
    pub(crate) const ALL: [Self; 4] = [Self::Virtio, Self::Nvme, Self::Qcow2, Self::Net];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Virtio => "virtio",
            Self::Nvme => "nvme",
            Self::Qcow2 => "qcow2",
            Self::Net => "net",
        }
    }

    pub(crate) fn tests(self) -> &'static [Test] {
        if self == Self::Net { NET } else { DISK }
    }

    /// The disk as Linux names it in a guest whose root is on NVMe and that has all disks.
    pub(crate) fn in_guest(self) -> &'static str {
        match self {
            Self::Virtio => "/dev/vda",
            Self::Qcow2 => "/dev/vdb",
            Self::Nvme | Self::Net => "/dev/nvme1n1",
        }
    }
}

/// A test on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Case {
    pub(crate) device: Device,
    pub(crate) test: Test,
}

impl Case {
    /// As reports have it, and `--tests` takes it.
    pub(crate) fn name(self) -> String {
        format!("{}/{}", self.device.name(), self.test.name)
    }
}

/// A list of tests that cannot be measured.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "there is no test `{0}`; name devices (virtio, nvme, qcow2, net), tests (randread-1, randwrite-1, randread-32, \
     randwrite-32, read-1m, write-1m; to-host, to-guest, tcp-1, udp-1), or both as virtio/read-1m"
)]
pub(crate) struct UnknownTest(String);

/// The cases that names stand for, in the table's order; all of them without names.
pub(crate) fn choose(names: &[String]) -> Result<Vec<Case>, UnknownTest> {
    let all: Vec<Case> = Device::ALL
        .into_iter()
        .flat_map(|device| device.tests().iter().map(move |&test| Case { device, test }))
        .collect();
    let means = |name: &str, case: &Case| [case.device.name(), case.test.name, &case.name()].contains(&name);
    if let Some(name) = names.iter().find(|name| !all.iter().any(|case| means(name, case))) {
        return Err(UnknownTest(name.clone()));
    }
    Ok(all
        .into_iter()
        .filter(|case| names.is_empty() || names.iter().any(|name| means(name, case)))
        .collect())
}

/// The image and the script that runs the tests.
pub(crate) fn kit() -> Kit {
    let files = vec![("run".to_owned(), include_str!("guest/run").to_owned())];
    Kit { name: "devices", image: "debian:io", files }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(chosen: &[&str]) -> Result<Vec<String>, UnknownTest> {
        let chosen: Vec<String> = chosen.iter().map(|&name| name.to_owned()).collect();
        Ok(choose(&chosen)?.into_iter().map(Case::name).collect())
    }

    #[test]
    fn tests_are_chosen_by_device_test_or_both() {
        assert_eq!(names(&[]).expect("all").len(), 22);
        assert_eq!(names(&["net"]).expect("four").len(), 4);
        assert_eq!(names(&["read-1m"]).expect("three"), ["virtio/read-1m", "nvme/read-1m", "qcow2/read-1m"]);
        assert_eq!(names(&["udp-1", "nvme/read-1m"]).expect("two"), ["nvme/read-1m", "net/udp-1"]);
        assert!(names(&["net/read-1m"]).expect_err("no such").to_string().contains("`net/read-1m`"));
    }

    #[test]
    fn less_is_better_for_times_only() {
        assert!((Unit::Microseconds.times(50.0, 100.0) - 2.0).abs() < 1e-9);
        assert!((Unit::Gigabits.times(50.0, 100.0) - 0.5).abs() < 1e-9);
    }

    #[test]
    fn script_knows_every_test() {
        for test in DISK.iter().chain(NET) {
            assert!(include_str!("guest/run").contains(test.name), "{}", test.name);
        }
    }
}
