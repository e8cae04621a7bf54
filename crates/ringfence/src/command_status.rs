//! How the command in the guest tells its exit status: a line on the second serial port.

use std::sync::{Arc, Mutex, PoisonError};

use ringfence_machine::SerialOutput;

/// What the line starts with; the status follows in decimal.
const PREFIX: &[u8] = b"ringfence-exit:";

/// A longer line is not ours.
const LONGEST_LINE: usize = 64;

/// Knows the status once the guest has told it. The last line of the kind holds.
#[derive(Clone, Debug, Default)]
pub(crate) struct CommandStatus(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    line: Vec<u8>,
    status: Option<u8>,
}

impl CommandStatus {
    /// The status, if the command has ended.
    pub(crate) fn get(&self) -> Option<u8> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).status
    }
}

impl SerialOutput for CommandStatus {
    fn write(&self, bytes: &[u8]) -> usize {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for &byte in bytes {
            if byte != b'\n' {
                if state.line.len() <= LONGEST_LINE {
                    state.line.push(byte);
                }
                continue;
            }
            state.status = parse(&state.line).or(state.status);
            state.line.clear();
        }
        bytes.len()
    }

    fn on_room(&self, _wake: Box<dyn Fn() + Send + Sync>) {}
}

fn parse(line: &[u8]) -> Option<u8> {
    let digits = line.strip_prefix(PREFIX)?;
    std::str::from_utf8(digits).ok()?.trim_end().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_is_found_between_other_lines() {
        let status = CommandStatus::default();
        status.write(b"noise\nringfence-exit:");
        assert_eq!(status.get(), None);
        status.write(b"3\r\nmore");
        assert_eq!(status.get(), Some(3));
    }

    #[test]
    fn nonsense_and_endless_lines_are_ignored() {
        let status = CommandStatus::default();
        status.write(b"ringfence-exit:256\nringfence-exit:x\nringfence-exit:\n");
        status.write(&vec![b'1'; 1 << 20]);
        assert!(status.0.lock().unwrap().line.len() <= LONGEST_LINE + 1);
        status.write(b"\n");
        assert_eq!(status.get(), None);
    }
}
