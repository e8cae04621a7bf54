//! The machine's named ports: what a user says of them, and what they are made from.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::mpsc::Sender;
use std::time::Duration;

use ringfence_devices::virtio::console::{Console, ConsoleConfig, PortConfig, PortEnd, PortSocket};
use ringfence_helper::listen;

use crate::console::ConsoleOutput;
use crate::control::{Event, reporter};
use crate::error::MachineError;

/// Bytes of a name at most.
const LONGEST_NAME: usize = 63;
/// How long a file may take nothing before the end of what was written to it is given up.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// A named port: a stream of bytes between a program of the guest and the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortSpec {
    /// Its name in the guest.
    pub name: String,
    /// Its end on the host.
    pub end: PortTarget,
}

/// Where a port leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PortTarget {
    /// To a Unix socket that programs connect to.
    Socket(PathBuf),
    /// To a file, made anew, that gets what the guest writes.
    File(PathBuf),
}

/// A `--port` that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PortSpecError {
    /// No name, or not one that can be a file's in the guest.
    #[error(
        "--port needs a name of up to 63 letters, digits, dots, dashes and underscores, such as name=org.example.0"
    )]
    Name,
    /// No end, or more than one.
    #[error("--port needs one end on the host: socket=PATH or file=PATH")]
    End,
    /// Not an option.
    #[error("{0:?} is no option of a port; there are name=, socket= and file=")]
    Option(String),
}

impl FromStr for PortSpec {
    type Err = PortSpecError;

    fn from_str(text: &str) -> Result<Self, PortSpecError> {
        let (mut name, mut ends) = (String::new(), Vec::new());
        for part in text.split(',') {
            match part.split_once('=') {
                Some(("name", value)) => name = value.to_owned(),
                Some(("socket", path)) if !path.is_empty() => ends.push(PortTarget::Socket(path.into())),
                Some(("file", path)) if !path.is_empty() => ends.push(PortTarget::File(path.into())),
                _ => return Err(PortSpecError::Option(part.to_owned())),
            }
        }
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        if !(1..=LONGEST_NAME).contains(&name.len()) || !name.bytes().all(plain) || name.starts_with('.') {
            return Err(PortSpecError::Name);
        }
        match <[PortTarget; 1]>::try_from(ends) {
            Ok([end]) => Ok(Self { name, end }),
            Err(_) => Err(PortSpecError::End),
        }
    }
}

/// A port that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum PortError {
    /// The socket.
    #[error("cannot listen on {socket:?} for a port")]
    Listen {
        /// Its path.
        socket: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file.
    #[error("cannot write what a port brings to {path:?}")]
    File {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// No descriptor or thread.
    #[error("the host refuses a thread for ports")]
    Start(#[source] io::Error),
}

/// The device with the ports, and what writes to files.
#[derive(Default)]
pub(crate) struct OpenPorts {
    pub(crate) device: Option<Console>,
    pub(crate) files: Files,
}

/// The files that ports write to.
#[derive(Default)]
pub(crate) struct Files(Vec<ConsoleOutput>);

impl Files {
    /// Brings out what is on its way to them.
    pub(crate) fn finish(&self) {
        self.0.iter().for_each(|file| file.finish(LAST_WORDS));
    }
}

/// Opens files, listens on sockets, and makes the device, if there are ports.
pub(crate) fn open(specs: &[PortSpec], events: &Sender<Event>) -> Result<OpenPorts, MachineError> {
    let mut files = Files::default();
    let mut ports = Vec::new();
    for spec in specs {
        let end = match &spec.end {
            PortTarget::Socket(path) => PortEnd::Socket(socket(path.clone())?),
            PortTarget::File(path) => {
                let file = output(path.clone(), events)?;
                files.0.push(file.clone());
                PortEnd::Output(file.port())
            }
        };
        ports.push(PortConfig { name: spec.name.clone(), end });
    }
    if ports.is_empty() {
        return Ok(OpenPorts::default());
    }
    let config = ConsoleConfig { ports, ..ConsoleConfig::default() };
    Ok(OpenPorts { device: Some(Console::new(config).map_err(PortError::Start)?), files })
}

fn socket(path: PathBuf) -> Result<PortSocket, PortError> {
    let listener = listen(&path).map_err(|source| PortError::Listen { socket: path.clone(), source })?;
    PortSocket::new(listener, path).map_err(PortError::Start)
}

fn output(path: PathBuf, events: &Sender<Event>) -> Result<ConsoleOutput, PortError> {
    let file = File::create(&path).map_err(|source| PortError::File { path: path.clone(), source })?;
    let tell = reporter(events, Event::DeviceBroken);
    let closed = move |error: &io::Error| {
        tell(format!("the file {path:?} of a port fails: {error}; it stays as it is"))
    };
    ConsoleOutput::start(file, closed).map_err(PortError::Start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_and_end_are_read_in_any_order() {
        let spec: PortSpec = "name=org.example.0,socket=/a/b".parse().unwrap();
        assert_eq!((spec.name.as_str(), spec.end), ("org.example.0", PortTarget::Socket("/a/b".into())));
        assert_eq!("file=x,name=log".parse::<PortSpec>().unwrap().end, PortTarget::File("x".into()));
    }

    #[test]
    fn nonsense_is_refused() {
        let long = format!("name={},file=x", "n".repeat(64));
        for text in [
            "",
            "name=a",
            "socket=/s",
            "name=,socket=/s",
            "name=a/b,socket=/s",
            "name=..,socket=/s",
            "name=a,socket=",
            "name=a,socket=/s,file=x",
            "name=a,pipe=x",
            "a",
            &long,
        ] {
            assert!(text.parse::<PortSpec>().is_err(), "{text}");
        }
    }
}
