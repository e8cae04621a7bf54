//! A command as the guest queued it (4.2).

use serde::{Deserialize, Serialize};

use super::spec::{COMMAND_SIZE, Status};

/// A submission queue entry, copied out of guest memory once, so that it cannot change under us.
#[derive(Clone, Copy, Debug)]
pub(super) struct Command {
    words: [u32; 16],
}

impl Command {
    pub(super) fn parse(bytes: &[u8; COMMAND_SIZE as usize]) -> Self {
        let mut words = [0; 16];
        for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(4)) {
            *word = bytes.iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte));
        }
        Self { words }
    }

    pub(super) fn opcode(&self) -> u8 {
        self.words[0] as u8
    }

    pub(super) fn id(&self) -> u16 {
        (self.words[0] >> 16) as u16
    }

    pub(super) fn namespace(&self) -> u32 {
        self.words[1]
    }

    pub(super) fn prp1(&self) -> u64 {
        u64::from(self.words[7]) << 32 | u64::from(self.words[6])
    }

    pub(super) fn prp2(&self) -> u64 {
        u64::from(self.words[9]) << 32 | u64::from(self.words[8])
    }

    pub(super) fn cdw10(&self) -> u32 {
        self.words[10]
    }

    pub(super) fn cdw11(&self) -> u32 {
        self.words[11]
    }

    pub(super) fn cdw12(&self) -> u32 {
        self.words[12]
    }

    pub(super) fn cdw13(&self) -> u32 {
        self.words[13]
    }

    /// The starting block of an I/O command.
    pub(super) fn start_block(&self) -> u64 {
        u64::from(self.words[11]) << 32 | u64::from(self.words[10])
    }

    /// Refuses fused operations and scatter-gather lists, neither of which is offered.
    pub(super) fn check_form(&self) -> Result<(), Status> {
        const FUSED: u32 = 0b11 << 8;
        const SGL: u32 = 0b11 << 14;
        if self.words[0] & (FUSED | SGL) == 0 { Ok(()) } else { Err(Status::INVALID_FIELD) }
    }
}

/// What has to be known of a command until its completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Ticket {
    /// The submission queue it came from.
    pub(super) queue: u16,
    /// Its identifier there.
    pub(super) id: u16,
    /// The namespace it is for.
    pub(super) namespace: u32,
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Outcome {
    /// The command-specific word.
    pub(super) result: u32,
    pub(super) status: Status,
    /// Bytes moved, and whether they were written.
    pub(super) moved: Option<(bool, u64)>,
}

impl Outcome {
    pub(super) fn done(result: u32) -> Self {
        Self { result, status: Status::SUCCESS, moved: None }
    }

    pub(super) fn failed(status: Status) -> Self {
        Self { result: 0, status, moved: None }
    }
}
