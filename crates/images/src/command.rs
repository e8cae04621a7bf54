//! How a command is handed to an image's session: as a shell script that sets the positional parameters, in a file
//! of the initial RAM disk where there is one, else on the kernel command line.

use crate::cpio::Writer;

/// Where the session looks for a command to run instead of a shell.
const COMMAND_PATH: &str = "run-command";

/// Bytes of the kernel command line that a command may take: Linux cuts it at 2048 (`COMMAND_LINE_SIZE`) without a
/// word, and the rest is for other options.
const MAX_WORD: usize = 1700;

/// The command does not fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the command takes {0} bytes of the kernel command line, and an image with a disk has room for {MAX_WORD}; shorten it, or \
     put it into a script on a disk of its own (--disk)"
)]
pub struct CommandTooLong(usize);

/// An additional archive that makes an image in memory run `command` instead of a shell; to be appended to the
/// image's initial RAM disk.
///
/// The command is not limited by the kernel command line's 2048 bytes and may hold any character. A NUL, which no
/// argument of a program can hold, is dropped.
pub fn command_archive(command: &[String]) -> Vec<u8> {
    let mut writer = Writer::new();
    // Fails only for a bad path or 4 GiB of text, and the host's own argument list is limited to a fraction of that.
    let written = writer.file(COMMAND_PATH, 0o600, format!("{}\n", script(command)).as_bytes());
    debug_assert!(written.is_ok());
    writer.finish()
}

/// A word of the kernel command line that makes an image with a disk run `command` instead of a shell.
///
/// # Errors
/// [`CommandTooLong`].
pub fn command_word(command: &[String]) -> Result<String, CommandTooLong> {
    let mut word = String::from("ringfence.command=");
    for byte in script(command).bytes() {
        // The kernel splits the line at spaces and has its own idea of quotes; `printf %b` understands the rest.
        if byte.is_ascii_alphanumeric() || b"_-./:,@+=^~".contains(&byte) {
            word.push(char::from(byte));
        } else {
            word.push_str(&format!("\\0{byte:03o}"));
        }
    }
    if word.len() > MAX_WORD { Err(CommandTooLong(word.len())) } else { Ok(word) }
}

/// Shell text that sets the positional parameters to the command and its arguments.
fn script(command: &[String]) -> String {
    let mut script = String::from("set --");
    for argument in command {
        script.push(' ');
        script.push_str(&quote(argument));
    }
    script
}

/// The argument as one word for a POSIX shell (XCU 2.2.2): nothing is special between single quotes.
fn quote(argument: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-./:,@+=".contains(&byte);
    if !argument.is_empty() && argument.bytes().all(plain) {
        return argument.to_owned();
    }
    let mut word = String::with_capacity(argument.len() + 2);
    word.push('\'');
    for character in argument.chars() {
        match character {
            '\0' => {}
            '\'' => word.push_str(r"'\''"),
            other => word.push(other),
        }
    }
    word.push('\'');
    word
}

#[cfg(test)]
mod tests;
