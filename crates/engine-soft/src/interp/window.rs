//! The bytes of code that is being decoded.

use ringfence_memory::GuestAddress;

use super::cpu::Cpu;
use super::decode::MAX_LENGTH;
use super::layout::LOOKED_AT;
use super::op::Op;
use crate::code::GRANULE;

/// Bytes of one page, read by whole granules, which are marked as code before they are read. What has been read stays good for one
/// region or block: whoever keeps something made from it hears of writes since the mark.
#[derive(Debug)]
pub(super) struct Window {
    page: GuestAddress,
    /// Which granules have been read, one bit each.
    read: u64,
    /// The page, as far as it has been read, and something behind it.
    bytes: Box<[u8; 0x1000 + LOOKED_AT]>,
    /// Room for a block being decoded.
    pub(super) ops: Vec<Op>,
}

impl Default for Window {
    fn default() -> Self {
        Self { page: GuestAddress(0), read: 0, bytes: Box::new([0; 0x1000 + LOOKED_AT]), ops: Vec::new() }
    }
}

/// Bytes of which the first, at most [`MAX_LENGTH`], are those of code; what is behind them is anything.
#[derive(Clone, Copy)]
pub(super) struct Code64<'a> {
    pub(super) all: &'a [u8; LOOKED_AT],
    pub(super) length: usize,
}

impl<'a> Code64<'a> {
    pub(super) fn bytes(&self) -> &'a [u8] {
        &self.all[..self.length]
    }
}

impl Window {
    /// A vCPU's, to be put back.
    #[inline(always)]
    pub(super) fn take(cpu: &mut Cpu) -> Box<Self> {
        cpu.window.take().unwrap_or_default()
    }

    #[inline(always)]
    pub(super) fn put_back(self: Box<Self>, cpu: &mut Cpu) {
        cpu.window = Some(self);
    }

    /// Nothing has been read.
    pub(super) fn forget(&mut self) {
        self.read = 0;
    }

    /// The bytes at an address: as many as an instruction can have, or all up to the end of the page.
    #[inline(always)]
    pub(super) fn at(&mut self, cpu: &mut Cpu, address: GuestAddress) -> Code64<'_> {
        let start = address.page_offset() as usize;
        let length = (0x1000 - start).min(MAX_LENGTH);
        let wanted = 1 << (start as u64 / GRANULE) | 1 << ((start + length - 1) as u64 / GRANULE);
        if address.page() != self.page || wanted & !self.read != 0 {
            self.read(cpu, address.page(), wanted);
        }
        Code64 { all: self.bytes[start & 0xfff..].first_chunk().unwrap_or(&[0; LOOKED_AT]), length }
    }

    /// Reads granules of a page that have not been read.
    #[inline(never)]
    fn read(&mut self, cpu: &mut Cpu, page: GuestAddress, wanted: u64) {
        if page != self.page {
            (self.page, self.read) = (page, 0);
        }
        let missing = wanted & !self.read;
        self.read |= missing;
        // One, or two neighbours.
        let first = u64::from(missing.trailing_zeros()) * GRANULE;
        let length = u64::from(missing.count_ones()) * GRANULE;
        let start = GuestAddress(page.0 + first);
        let room = &mut self.bytes[first as usize..(first + length) as usize];
        match cpu.memory.page(page) {
            Some(page) => {
                if cpu.code.mark(start, length) {
                    cpu.tlb.protect(page.host);
                }
                // The page was there a moment ago and regions never go away.
                let _ = cpu.memory.read_bytes(start, room);
            }
            // Nothing answers there: the bus floats high.
            None => room.fill(0xff),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interp::testing::Lab;

    /// The first byte that a window shows at an address, and how many there are.
    fn look(lab: &mut Lab, window: &mut Window, address: u64) -> (u8, usize) {
        let code = window.at(&mut lab.m.cpu, GuestAddress(address));
        (code.bytes()[0], code.length)
    }

    #[test]
    fn bytes_are_read_once_until_they_are_forgotten() {
        let mut lab = Lab::long();
        let mut window = Window::default();
        lab.put::<u8>(0x8_0010, 1);
        assert_eq!(look(&mut lab, &mut window, 0x8_0010), (1, MAX_LENGTH));
        lab.put::<u8>(0x8_0010, 2);
        assert_eq!(look(&mut lab, &mut window, 0x8_0010).0, 1);
        window.forget();
        assert_eq!(look(&mut lab, &mut window, 0x8_0010).0, 2);
        lab.put::<u8>(0x8_1010, 3);
        assert_eq!(look(&mut lab, &mut window, 0x8_1010).0, 3, "another page");
        lab.put::<u8>(0x8_0010, 4);
        assert_eq!(look(&mut lab, &mut window, 0x8_0010).0, 4, "and back");
    }

    #[test]
    fn granules_of_an_instruction_are_marked_and_no_others() {
        let mut lab = Lab::long();
        let mut window = Window::default();
        // The last of the first granule and fourteen of the second.
        look(&mut lab, &mut window, 0x8_003f);
        let code = std::sync::Arc::clone(&lab.m.cpu.code);
        assert!(!code.written(GuestAddress(0x8_0080), 1));
        assert!(code.written(GuestAddress(0x8_007f), 1));
        window.forget();
        look(&mut lab, &mut window, 0x8_003f);
        assert!(code.written(GuestAddress(0x8_0000), 1));
    }

    #[test]
    fn end_of_the_page_is_the_end_of_the_bytes() {
        let mut lab = Lab::long();
        let mut window = Window::default();
        for left in 1..=MAX_LENGTH {
            assert_eq!(look(&mut lab, &mut window, 0x8_1000 - left as u64).1, left);
        }
        // Nothing answers there.
        assert_eq!(look(&mut lab, &mut window, 1 << 40), (0xff, MAX_LENGTH));
    }
}
