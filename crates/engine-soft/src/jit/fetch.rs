//! Which physical pages code is fetched from: page walks remembered for as long as the soft TLB's generation lasts.

use ringfence_memory::GuestAddress;
use ringfence_x86::Exception;

use crate::interp::cpu::Cpu;
use crate::interp::decode::translate_fetch;

/// Pages remembered.
const ENTRIES: usize = 512;

#[derive(Clone, Copy, Debug)]
struct Entry {
    page: u64,
    /// See `Cpu::jump_context`: mode, privilege and generation. Never zero for a vCPU.
    context: u64,
    physical: GuestAddress,
}

const NO_ENTRY: Entry = Entry { page: 0, context: 0, physical: GuestAddress(0) };

/// The pages that code was fetched from of late.
#[derive(Debug)]
pub(super) struct FetchCache(Box<[Entry]>);

impl Default for FetchCache {
    fn default() -> Self {
        Self(vec![NO_ENTRY; ENTRIES].into_boxed_slice())
    }
}

impl FetchCache {
    /// Physical address of the code byte at `linear`; `context` is the vCPU's.
    ///
    /// # Errors
    /// #PF, or #GP(0) for a non-canonical address.
    pub(super) fn translate(
        &mut self,
        cpu: &mut Cpu,
        linear: u64,
        context: u64,
    ) -> Result<GuestAddress, Exception> {
        let page = linear & !0xfff;
        let entry = &mut self.0[(linear >> 12) as usize % ENTRIES];
        if entry.page != page || entry.context != context {
            *entry = Entry { page, context, physical: translate_fetch(cpu, linear)?.page() };
        }
        Ok(GuestAddress(entry.physical.0 | linear & 0xfff))
    }
}
