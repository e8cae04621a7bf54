//! Running blocks.

use ringfence_x86::segment::attribute;
use ringfence_x86::{Exception, SegmentRegister};

use super::block::{BlockCache, BlockId, BlockKey};
use super::cpu::{CodeSize, Cpu};
use super::decode::{decode_block, translate_fetch};
use super::op::RIP;

/// A vCPU with its decoded code.
#[derive(Debug)]
pub struct Interpreter {
    /// The vCPU.
    pub cpu: Cpu,
    /// Its blocks.
    pub blocks: BlockCache,
}

impl Interpreter {
    /// An interpreter for a vCPU.
    pub fn new(cpu: Cpu) -> Self {
        Self { cpu, blocks: BlockCache::default() }
    }

    /// Executes exactly one instruction, or one iteration batch of a repeated string instruction.
    ///
    /// # Errors
    /// The exception that it raised, not delivered; RIP points at the instruction then.
    pub fn step(&mut self) -> Result<(), Exception> {
        self.run_block(1)
    }

    /// Executes up to `limit` instructions of the block at RIP. Returns early where the block ends, or an
    /// instruction asked to leave it.
    ///
    /// # Errors
    /// The exception that an instruction raised, not delivered; RIP points at the instruction then.
    #[inline(always)]
    pub fn run_block(&mut self, limit: usize) -> Result<(), Exception> {
        if self.cpu.stale.any() {
            self.drop_stale();
        }
        let id = self.find_block()?;
        let Some(block) = self.blocks.get(id) else { return Ok(()) };
        let cpu = &mut self.cpu;
        let limit =
            if cpu.is_64bit() { limit } else { cpu.limit_in_segment(block.length, &block.ops[0], limit)? };
        cpu.leave_block = false;
        let mut outcome = Ok(());
        for op in block.ops.iter().take(limit) {
            let start = cpu.regs[RIP];
            cpu.regs[RIP] = start.wrapping_add(u64::from(op.length));
            if let Err(exception) = (op.handler)(cpu, op) {
                cpu.regs[RIP] = start;
                outcome = Err(exception);
                break;
            }
            // At each instruction, since some of them look at counted time.
            cpu.retired += 1;
            if cpu.leave_block {
                break;
            }
        }
        outcome
    }

    /// Drops blocks whose bytes have changed.
    #[cold]
    fn drop_stale(&mut self) {
        for (page, mask) in self.cpu.stale.take() {
            self.blocks.invalidate(page, mask);
        }
    }

    #[inline(always)]
    fn find_block(&mut self) -> Result<BlockId, Exception> {
        let cpu = &mut self.cpu;
        let linear = cpu.fetch_address();
        let context = cpu.code_size as u32 | u32::from(cpu.cpl == 3) << 2;
        match self.blocks.jump(linear, context, cpu.tlb.generation(cpu.cpl == 3)) {
            Some(id) => Ok(id),
            None => self.find_block_slowly(linear, context),
        }
    }

    #[cold]
    fn find_block_slowly(&mut self, linear: u64, context: u32) -> Result<BlockId, Exception> {
        let address = translate_fetch(&mut self.cpu, linear)?;
        if self.cpu.stale.any() {
            // The walk has marked an entry in a page that is code as well.
            self.drop_stale();
        }
        let cpu = &mut self.cpu;
        let key = BlockKey { address, size: cpu.code_size };
        let found = self.blocks.find(key);
        let second = found.and_then(|id| self.blocks.get(id)?.second_page);
        let valid = match second {
            Some(page) => {
                let mask = if cpu.long_mode() { u64::MAX } else { 0xffff_ffff };
                translate_fetch(cpu, (linear | 0xfff).wrapping_add(1) & mask)? == page
            }
            None => true,
        };
        let id = match found {
            Some(id) if valid => id,
            found => {
                if found.is_some() {
                    // The same first page with another second one: the old block cannot stay under its key.
                    self.blocks.invalidate(address.page(), u64::MAX);
                }
                let block = decode_block(&mut self.cpu, linear, address)?;
                self.blocks.insert(block)
            }
        };
        let generation = self.cpu.tlb.generation(self.cpu.cpl == 3);
        self.blocks.remember(linear, context, generation, id);
        Ok(id)
    }
}

impl Cpu {
    /// Linear address of the next instruction.
    #[inline(always)]
    pub fn fetch_address(&self) -> u64 {
        if self.code_size == CodeSize::Bits64 {
            self.regs[RIP]
        } else {
            self.segment(SegmentRegister::Cs).base.wrapping_add(self.regs[RIP]) & 0xffff_ffff
        }
    }

    /// Outside 64-bit mode: how many instructions may run before the code segment's limit must be looked at again.
    fn limit_in_segment(&self, length: u32, first: &super::op::Op, limit: usize) -> Result<usize, Exception> {
        let cs = self.segment(SegmentRegister::Cs);
        debug_assert!(cs.has(attribute::S) || !self.protected());
        let rip = self.regs[RIP];
        if rip + u64::from(length) <= u64::from(cs.limit) + 1 {
            return Ok(limit);
        }
        if rip + u64::from(first.length) > u64::from(cs.limit) + 1 { Err(Exception::GP0) } else { Ok(1) }
    }
}
