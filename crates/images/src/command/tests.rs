use std::io::Write;
use std::process::{Command, Stdio};

use super::*;
use crate::cpio::tests::parse;
use crate::initramfs::Initramfs;

fn paths(archive: &[u8]) -> Vec<String> {
    parse(archive).into_iter().map(|entry| entry.0).collect()
}

fn contents(archive: &[u8], path: &str) -> Vec<u8> {
    parse(archive).into_iter().find(|entry| entry.0 == path).unwrap_or_else(|| panic!("no {path}")).4
}

/// What a shell makes of the archive's command: each argument, closed by a NUL.
fn arguments_seen_by_a_shell(command: &[&str]) -> Vec<u8> {
    let command: Vec<String> = command.iter().map(|&argument| argument.to_owned()).collect();
    let archive = command_archive(&command);
    let in_archive = arguments_of(contents(&archive, "run-command"));
    if let Ok(word) = command_word(&command) {
        // One word of printable characters, which the session decodes so.
        assert!(word.bytes().all(|byte| byte.is_ascii_graphic() && !b"\"'".contains(&byte)), "{word}");
        let (_, encoded) = word.split_once('=').expect("has a value");
        let script = format!("encoded='{encoded}'\neval \"$(printf '%b' \"$encoded\")\"\n");
        assert_eq!(arguments_of(script.into_bytes()), in_archive);
    }
    in_archive
}

fn arguments_of(mut script: Vec<u8>) -> Vec<u8> {
    script.extend_from_slice(b"for i; do printf '%s\\0' \"$i\"; done\n");
    let mut shell =
        Command::new("sh").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("there is a shell");
    shell.stdin.take().expect("piped").write_all(&script).expect("it reads all");
    let output = shell.wait_with_output().expect("ends");
    assert!(output.status.success());
    output.stdout
}

#[test]
fn command_reaches_the_shell_as_it_is() {
    let command = [
        "sh",
        "-c",
        "echo \"$HOME\" `id` $(id) \\ \\n",
        "it's",
        "''",
        "",
        " two  spaces ",
        "two\nlines\n",
        "tab\t\r\x1b[0m",
        "ünïcödé 🦀",
        "--",
        "-n",
        "*",
        "~",
        "#no comment",
        "a;b&c|d<e>f",
        "!history",
    ];
    let expected: Vec<u8> = command.iter().flat_map(|argument| argument.bytes().chain([0])).collect();
    assert_eq!(arguments_seen_by_a_shell(&command), expected);
}

#[test]
fn long_command_is_kept_whole_and_nul_is_dropped() {
    let long = "x".repeat(100_000);
    assert_eq!(arguments_seen_by_a_shell(&[&long]).len(), 100_001);
    assert_eq!(arguments_seen_by_a_shell(&["a\0b"]), b"ab\0");
    assert_eq!(arguments_seen_by_a_shell(&[]), b"");
}

#[test]
fn command_archive_follows_another_one() {
    let base = Initramfs::shell(b"busybox".to_vec()).and_then(|archive| archive.build()).expect("builds");
    let both = [base.clone(), command_archive(&["id".to_owned()])].concat();
    assert_eq!(paths(&both).len(), paths(&base).len() + 1);
    assert_eq!(contents(&both, "run-command"), b"set -- id\n");
}

#[test]
fn command_too_long_for_the_kernel_is_refused_with_advice() {
    let error = command_word(&["x".repeat(2000)]).expect_err("is too long");
    assert!(error.to_string().contains("--disk"), "{error}");
    assert!(command_word(&["x".repeat(1600)]).is_ok());
}
