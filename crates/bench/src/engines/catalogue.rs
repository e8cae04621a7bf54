//! The programs that are measured: a table. Each is a shell command in `/bench` of the guest whose output is its result.

use crate::root::Kit;

/// What a program spends its time with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Class {
    /// Compilers, interpreters, compressors: integers and branches, some scalar floating point.
    Integer,
    /// System calls, faults, processes, switches between them.
    Kernel,
    /// Vectors, cryptography, moving memory.
    Vector,
    /// Starting up; has no native counterpart.
    Boot,
}

impl Class {
    pub(crate) const ALL: [Self; 4] = [Self::Integer, Self::Kernel, Self::Vector, Self::Boot];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Integer => "integer/branchy",
            Self::Kernel => "kernel-heavy",
            Self::Vector => "vector/crypto/memory",
            Self::Boot => "boot",
        }
    }
}

/// A program.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Program {
    pub(crate) name: &'static str,
    pub(crate) class: Class,
    /// For `/bin/sh`.
    pub(crate) command: &'static str,
}

/// Not a program: from power-on to the first line of the guest's session.
pub(crate) const BOOT: &str = "boot";
/// The first run of `cc` in a fresh machine, when no engine knows its code yet; measured with `cc`.
pub(crate) const COLD: &str = "cc-cold";
pub(crate) const WARM: &str = "cc";

const fn program(name: &'static str, class: Class, command: &'static str) -> Program {
    Program { name, class, command }
}

/// All of them. `cc` comes first, so that its first run is a cold one.
pub(crate) const PROGRAMS: &[Program] = &[
    program(WARM, Class::Integer, "gcc -O1 -S -o - data/program.c"),
    program("python", Class::Integer, "python3 -I -S -B src/work.py"),
    program("perl", Class::Integer, "perl src/work.pl"),
    program("awk-float", Class::Integer, "gawk -f src/work.awk"),
    program("sort", Class::Integer, "sort data/text data/text"),
    program("gzip", Class::Integer, "gzip -6 -n -c data/text"),
    program("zstd", Class::Integer, "zstd -q -7 -c data/text"),
    program("sqlite", Class::Integer, "sqlite3 :memory: <data/query.sql"),
    program(
        "shell-forks",
        Class::Kernel,
        "i=0; while [ $i -lt 80 ]; do x=$(echo $i | cat); i=$((x + 1)); done; echo $i",
    ),
    program("ping-pong", Class::Kernel, "bin/pingpong"),
    program("getppid", Class::Kernel, "bin/getppid"),
    program("page-faults", Class::Kernel, "bin/faults"),
    program("fork-exec", Class::Kernel, "bin/forkexec"),
    program("threads", Class::Kernel, "bin/threads"),
    program(
        "find",
        Class::Kernel,
        "for i in 1 2; do find /usr -xdev -name modules -prune -o -type f -size +8k -print; done | sort",
    ),
    program("sha256sum", Class::Vector, "for i in 1 2 3 4; do sha256sum data/text; done"),
    program("rsa", Class::Vector, "bin/rsa"),
    program("aes-gcm", Class::Vector, "bin/aesgcm"),
    program("memcpy-strlen", Class::Vector, "bin/memory"),
    program("dgemm", Class::Vector, "bin/dgemm"),
];

/// Files of the guest's `/bench`, in the repository as text.
pub(crate) const FILES: &[(&str, &str)] = &[
    ("run", include_str!("guest/run")),
    ("prepare", include_str!("guest/prepare")),
    ("src/measure.c", include_str!("guest/measure.c")),
    ("src/aesgcm.c", include_str!("guest/aesgcm.c")),
    ("src/dgemm.c", include_str!("guest/dgemm.c")),
    ("src/faults.c", include_str!("guest/faults.c")),
    ("src/forkexec.c", include_str!("guest/forkexec.c")),
    ("src/getppid.c", include_str!("guest/getppid.c")),
    ("src/memory.c", include_str!("guest/memory.c")),
    ("src/pingpong.c", include_str!("guest/pingpong.c")),
    ("src/rsa.c", include_str!("guest/rsa.c")),
    ("src/threads.c", include_str!("guest/threads.c")),
    ("src/work.awk", include_str!("guest/work.awk")),
    ("src/work.pl", include_str!("guest/work.pl")),
    ("src/work.py", include_str!("guest/work.py")),
];

/// What the programs are run with, compiled by the image's own gcc.
pub(crate) fn kit() -> Kit {
    let files = FILES.iter().map(|&(name, text)| (name.to_owned(), text.to_owned()));
    let commands = PROGRAMS
        .iter()
        .map(|program| (format!("commands/{}", program.name), format!("{}\n", program.command)));
    Kit { name: "engines", image: "debian:dev", files: files.chain(commands).collect() }
}

/// A list of programs that cannot be measured.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no program `{name}`; there are {known}, and {BOOT} and {COLD} with any of them")]
pub(crate) struct UnknownProgram {
    name: String,
    known: String,
}

/// The programs named, in the table's order; all of them without names. [`BOOT`] is measured in any case, [`COLD`] with
/// [`WARM`].
pub(crate) fn choose(names: &[String]) -> Result<Vec<&'static Program>, UnknownProgram> {
    let known =
        |name: &str| PROGRAMS.iter().any(|program| program.name == name) || name == BOOT || name == COLD;
    if let Some(name) = names.iter().find(|name| !known(name)) {
        let all: Vec<&str> = PROGRAMS.iter().map(|program| program.name).collect();
        return Err(UnknownProgram { name: name.clone(), known: all.join(", ") });
    }
    let wanted = |program: &&Program| {
        names.is_empty()
            || names.iter().any(|name| name == program.name || (name == COLD && program.name == WARM))
    };
    Ok(PROGRAMS.iter().filter(wanted).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(chosen: &[&str]) -> Result<Vec<&'static str>, UnknownProgram> {
        let chosen: Vec<String> = chosen.iter().map(|&name| name.to_owned()).collect();
        Ok(choose(&chosen)?.into_iter().map(|program| program.name).collect())
    }

    #[test]
    fn programs_are_chosen_by_name_in_the_tables_order() {
        assert_eq!(names(&[]).expect("all").len(), PROGRAMS.len());
        assert_eq!(names(&["find", "sort"]).expect("two"), ["sort", "find"]);
        assert_eq!(names(&["cc-cold", "boot"]).expect("one"), ["cc"]);
        assert!(names(&["sort", "tetris"]).expect_err("no such").to_string().contains("`tetris`"));
    }

    #[test]
    fn every_program_has_a_name_of_its_own_and_its_source_in_the_table() {
        let unique: std::collections::BTreeSet<&str> = PROGRAMS.iter().map(|program| program.name).collect();
        assert_eq!(unique.len(), PROGRAMS.len());
        assert_eq!(PROGRAMS[0].name, WARM);
        for program in PROGRAMS {
            for word in program.command.split_whitespace() {
                let source = match (word.strip_prefix("bin/"), word.starts_with("src/")) {
                    (Some(binary), _) => format!("src/{binary}.c"),
                    (None, true) => word.to_owned(),
                    (None, false) => continue,
                };
                assert!(FILES.iter().any(|(path, _)| *path == source), "{source}");
            }
        }
    }
}
