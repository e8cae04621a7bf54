//! Features that the guest can set and ask for (5.21).

use serde::{Deserialize, Serialize};

use super::spec::Status;

mod id {
    pub(super) const ARBITRATION: u8 = 0x01;
    pub(super) const POWER_MANAGEMENT: u8 = 0x02;
    pub(super) const TEMPERATURE_THRESHOLD: u8 = 0x04;
    pub(super) const ERROR_RECOVERY: u8 = 0x05;
    pub(super) const WRITE_CACHE: u8 = 0x06;
    pub(super) const NUMBER_OF_QUEUES: u8 = 0x07;
    pub(super) const INTERRUPT_COALESCING: u8 = 0x08;
    pub(super) const INTERRUPT_VECTOR: u8 = 0x09;
    pub(super) const WRITE_ATOMICITY: u8 = 0x0a;
    pub(super) const ASYNC_EVENTS: u8 = 0x0b;
}

/// The temperature reported, in kelvins: the disk is none the warmer for what it does.
pub(super) const TEMPERATURE: u16 = 300;

/// Their values. Arbitration, coalescing and the like are kept and have no effect: commands are taken as they
/// come and every completion is signalled at once.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Features {
    arbitration: u32,
    /// Over and under temperature, in kelvins.
    thresholds: [u16; 2],
    error_recovery: u32,
    /// Whether writes may wait for a flush.
    pub(super) write_cache: bool,
    /// I/O queue pairs that the guest may make.
    pub(super) queues: u16,
    coalescing: u32,
    /// One for each vector: whether coalescing is disabled.
    vectors: Vec<bool>,
    write_atomicity: u32,
    /// Which events the guest wants.
    pub(super) events: u32,
}

impl Features {
    /// As after a reset, for a controller of so many I/O queue pairs, each with a vector beside the admin queue's.
    pub(super) fn new(queues: u16) -> Self {
        Self {
            arbitration: 0,
            thresholds: [u16::MAX, 0],
            error_recovery: 0,
            write_cache: true,
            queues,
            coalescing: 0,
            vectors: vec![false; usize::from(queues) + 1],
            write_atomicity: 0,
            events: 0,
        }
    }

    /// Whether these are values of such a controller.
    pub(super) fn fits(&self, queues: u16) -> bool {
        (1..=queues).contains(&self.queues) && self.vectors.len() == usize::from(queues) + 1
    }

    /// SMART critical warnings: whether the temperature is past a threshold.
    pub(super) fn critical_warning(&self) -> u8 {
        let [over, under] = self.thresholds;
        u8::from(TEMPERATURE >= over || TEMPERATURE <= under) << 1
    }

    /// The threshold that a command means.
    fn threshold(&mut self, word: u32) -> Result<&mut u16, Status> {
        let sensor = word >> 16 & 0xf;
        let which = (word >> 20 & 3) as usize;
        match self.thresholds.get_mut(which) {
            Some(threshold) if matches!(sensor, 0 | 0xf) => Ok(threshold),
            _ => Err(Status::INVALID_FIELD),
        }
    }

    fn vector(&mut self, word: u32) -> Result<&mut bool, Status> {
        self.vectors.get_mut((word & 0xffff) as usize).ok_or(Status::INVALID_FIELD)
    }

    /// What a feature is set to; `most` is how many queue pairs the controller has.
    pub(super) fn get(&mut self, feature: u32, word: u32) -> Result<u32, Status> {
        Ok(match feature as u8 {
            id::ARBITRATION => self.arbitration,
            id::POWER_MANAGEMENT => 0,
            id::TEMPERATURE_THRESHOLD => u32::from(*self.threshold(word)?),
            id::ERROR_RECOVERY => self.error_recovery,
            id::WRITE_CACHE => u32::from(self.write_cache),
            id::NUMBER_OF_QUEUES => self.number_of_queues(),
            id::INTERRUPT_COALESCING => self.coalescing,
            id::INTERRUPT_VECTOR => u32::from(*self.vector(word)?) << 16 | word & 0xffff,
            id::WRITE_ATOMICITY => self.write_atomicity,
            id::ASYNC_EVENTS => self.events,
            _ => return Err(Status::INVALID_FIELD),
        })
    }

    /// Queues allocated, zero-based, completion queues in the upper half.
    fn number_of_queues(&self) -> u32 {
        u32::from(self.queues - 1) * 0x1_0001
    }

    /// Sets a feature and gives the command's result. `most` is how many I/O queue pairs there can be;
    /// `has_queues`, whether any has been made.
    pub(super) fn set(
        &mut self,
        feature: u32,
        word: u32,
        most: u16,
        has_queues: bool,
    ) -> Result<u32, Status> {
        const SAVE: u32 = 1 << 31;
        if feature & SAVE != 0 {
            return Err(Status::NOT_SAVEABLE);
        }
        match feature as u8 {
            id::ARBITRATION => self.arbitration = word,
            id::POWER_MANAGEMENT if word & 0x1f == 0 => (),
            id::TEMPERATURE_THRESHOLD => *self.threshold(word)? = word as u16,
            id::ERROR_RECOVERY => self.error_recovery = word & 0xffff,
            id::WRITE_CACHE => self.write_cache = word & 1 != 0,
            id::NUMBER_OF_QUEUES => {
                let (submission, completion) = (word & 0xffff, word >> 16);
                if submission == 0xffff || completion == 0xffff {
                    return Err(Status::INVALID_FIELD);
                }
                if has_queues {
                    return Err(Status::SEQUENCE_ERROR);
                }
                let wanted = submission.max(completion) + 1;
                self.queues = u16::try_from(wanted).unwrap_or(u16::MAX).min(most);
                return Ok(self.number_of_queues());
            }
            id::INTERRUPT_COALESCING => self.coalescing = word & 0xffff,
            id::INTERRUPT_VECTOR => *self.vector(word)? = word >> 16 & 1 != 0,
            id::WRITE_ATOMICITY => self.write_atomicity = word & 1,
            id::ASYNC_EVENTS => self.events = word,
            _ => return Err(Status::INVALID_FIELD),
        }
        Ok(0)
    }
}
