use clap::CommandFactory;

use super::*;

fn run(words: &[&str]) -> Result<RunArguments, clap::Error> {
    let words = ["ringfence", "run"].iter().chain(words);
    match Arguments::try_parse_from(words)?.command {
        Command::Run(run) => Ok(*run),
        other => panic!("{other:?}"),
    }
}

#[test]
fn definition_is_consistent() {
    Arguments::command().debug_assert();
}

#[test]
fn defaults_boot_a_shell() {
    let run = run(&[]).unwrap();
    assert_eq!((run.image, run.memory, run.cpus), (None, ByteSize(512 << 20), 1));
    let console = ConsoleArgument { target: ConsoleTarget::Stdio, virtio: false };
    assert_eq!((run.engine, run.console), (EngineChoice::Auto, console));
}

#[test]
fn command_follows_the_dashes() {
    let run = run(&["shell", "--memory", "1G", "--", "sh", "-c", "exit 3"]).unwrap();
    assert_eq!(run.image.as_deref(), Some("shell"));
    assert_eq!(run.command, ["sh", "-c", "exit 3"]);
}

#[test]
fn kernel_takes_initrds_and_no_image() {
    let words = ["--kernel", "k", "--initrd", "a", "--initrd", "b", "--append", "x", "--append", "y"];
    let arguments = run(&words).unwrap();
    assert_eq!((arguments.initrd.len(), arguments.append.join(" ").as_str()), (2, "x y"));
    assert!(run(&["shell", "--kernel", "k"]).is_err());
}

#[test]
fn unknown_values_are_refused() {
    for words in [
        ["--engine", "tcg"],
        ["--memory", "lots"],
        ["--cpu", "z80"],
        ["--cpus", "-1"],
        ["--console", "file="],
        ["--console", "stdio,device=vga"],
        ["--port", "name=a"],
        ["--port", "socket=s"],
        ["--watchdog", "bark"],
        ["--timeout", "-5"],
        ["--timeout", "NaN"],
        ["--timeout", "inf"],
        ["--debug-exit", "0x10000"],
        ["--sideways", "1"],
        ["--disk", "a.vmdk,format=vmdk"],
        ["--share", "/srv"],
        ["--vsock", "cid=1,socket=s"],
        ["--share", "/srv:..,readonly"],
        ["--disk", "a.raw,bus=ide"],
        ["--disk", "a.raw,cache=sometimes"],
    ] {
        assert!(run(&words).is_err(), "{words:?}");
    }
}

#[test]
fn features_to_come_are_refused_by_name() {
    let error = run(&["--fence", "off"]).unwrap().refuse_what_is_not_there().unwrap_err().to_string();
    assert!(error.starts_with("--fence") && error.contains("not in this version"), "{error}");
    assert_eq!(run(&["--net", "none", "--no-code-cache"]).unwrap().refuse_what_is_not_there(), Ok(()));
}

#[test]
fn numbers_are_understood() {
    assert_eq!(parse_seconds("0.5"), Ok(Duration::from_millis(500)));
    assert_eq!((parse_port("0xf4"), parse_port("244")), (Ok(0xf4), Ok(0xf4)));
}

#[test]
fn console_is_a_place_and_a_device() {
    let console = |text: &str| run(&["--console", text]).unwrap().console;
    let expected = |target, virtio| ConsoleArgument { target, virtio };
    assert_eq!(console("virtio"), expected(ConsoleTarget::Stdio, true));
    assert_eq!(console("stdio,device=virtio"), expected(ConsoleTarget::Stdio, true));
    assert_eq!(console("serial"), expected(ConsoleTarget::Stdio, false));
    assert_eq!(console("file=a=b,device=virtio"), expected(ConsoleTarget::File("a=b".into()), true));
    assert_eq!(console("none"), expected(ConsoleTarget::None, false));
}
