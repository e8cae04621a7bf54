//! A keyboard that answers every command and never has a key pressed.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

const ACK: u8 = 0xfa;
const RESEND: u8 = 0xfe;
/// The keyboard's own buffer.
const BUFFER: usize = 16;

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Keyboard {
    answers: VecDeque<u8>,
    /// The command whose parameter is next.
    awaited: Option<u8>,
}

impl Keyboard {
    pub(super) fn is_valid(&self) -> bool {
        self.answers.len() <= BUFFER
    }

    /// The next byte to the controller, translated to scan code set 1 if the controller does that. Of all that
    /// this keyboard says, only the second byte of its identity is changed by it.
    pub(super) fn take(&mut self, translate: bool) -> Option<u8> {
        self.answers.pop_front().map(|byte| if translate && byte == 0x83 { 0x41 } else { byte })
    }

    fn answer(&mut self, bytes: &[u8]) {
        if self.answers.len() + bytes.len() <= BUFFER {
            self.answers.extend(bytes);
        }
    }

    pub(super) fn command(&mut self, value: u8) {
        match (self.awaited.take(), value) {
            // Scan code set 0 asks for the one in use.
            (Some(0xf0), 0) => self.answer(&[ACK, 2]),
            (Some(_), _) => self.answer(&[ACK]),
            // Set LEDs, scan code set, typing rate: a parameter follows.
            (None, 0xed | 0xf0 | 0xf3) => {
                self.awaited = Some(value);
                self.answer(&[ACK]);
            }
            (None, 0xee) => self.answer(&[0xee]),
            (None, 0xf2) => self.answer(&[ACK, 0xab, 0x83]),
            // Enable, disable, defaults, and the typematic commands of set 3.
            (None, 0xf4..=0xfa) => self.answer(&[ACK]),
            // Reset and self-test.
            (None, 0xff) => {
                self.answers.clear();
                self.answer(&[ACK, 0xaa]);
            }
            (None, _) => self.answer(&[RESEND]),
        }
    }
}
