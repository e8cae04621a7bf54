//! The handlers of integer instructions, asked for once for each form.
//!
//! A form is the decoder library's code, whether an operand is in memory, and whether there is a LOCK prefix: the families look at
//! nothing else.

use iced_x86::{Code, Instruction};

use super::integer;
use super::op::Handler;

/// No such form has been seen.
const UNKNOWN: u16 = u16::MAX;

/// Those found so far.
pub(super) struct Handlers {
    /// Where in `found` each form is.
    index: Box<[u16]>,
    found: Vec<Option<Handler>>,
}

impl std::fmt::Debug for Handlers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Handlers").field("found", &self.found.len()).finish()
    }
}

impl Default for Handlers {
    fn default() -> Self {
        let index = vec![UNKNOWN; 4 * Code::values().len()].into_boxed_slice();
        Self { index, found: Vec::new() }
    }
}

impl Handlers {
    /// As [`integer::handler`]. `memory`: an operand is in memory.
    #[inline]
    pub(super) fn integer(&mut self, instruction: &Instruction, memory: bool) -> Option<Handler> {
        let form = 2 * usize::from(memory) + usize::from(instruction.has_lock_prefix());
        let index = &mut self.index[4 * instruction.code() as usize + form];
        if *index == UNKNOWN {
            *index = self.found.len() as u16;
            self.found.push(integer::handler(instruction));
        }
        self.found[usize::from(*index)]
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use iced_x86::{Decoder, DecoderOptions, OpKind};

    use super::*;

    /// Bytes that look random, with the opcodes of all maps, and prefixes now and then.
    pub(crate) fn bytes(seed: u64) -> [u8; 15] {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 24) as u8
        };
        let mut bytes: [u8; 15] = std::array::from_fn(|_| next());
        let mut at = 0;
        for (prefix, one_in) in [(0x66, 4), (0xf3, 8), (0xf2, 8), (0x40, 2)] {
            if next() % one_in == 0 {
                bytes[at] = if prefix == 0x40 { 0x40 | next() & 15 } else { prefix };
                at += 1;
            }
        }
        match next() % 8 {
            0..3 => bytes[at] = 0x0f,
            3 => bytes[at..at + 2].copy_from_slice(&[0x0f, 0x38]),
            4 => bytes[at..at + 2].copy_from_slice(&[0xc4, 0xe1 + next() % 3]),
            _ => {}
        }
        bytes
    }

    #[test]
    fn handler_of_a_form_is_that_of_each_instruction_of_it() {
        let mut handlers = Handlers::default();
        for seed in 0..200_000 {
            let bytes = bytes(seed);
            for bits in [16, 32, 64] {
                let instruction = Decoder::with_ip(bits, &bytes, 0, DecoderOptions::NONE).decode();
                let memory = (0..instruction.op_count()).any(|n| instruction.op_kind(n) == OpKind::Memory);
                let same = match (handlers.integer(&instruction, memory), integer::handler(&instruction)) {
                    (Some(one), Some(other)) => std::ptr::fn_addr_eq(one, other),
                    (one, other) => one.is_none() && other.is_none(),
                };
                assert!(same, "{bits} bits, {bytes:x?}");
            }
        }
        assert!(handlers.found.len() > 1000, "{handlers:?}");
    }
}
