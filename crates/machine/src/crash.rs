//! What to tell when a guest cannot go on.

use std::fmt;

use ringfence_engine::CpuState;
use ringfence_memory::GuestMemory;
use ringfence_x86::Efer;

use crate::walk::read_linear;

/// Bytes of code shown from RIP on.
const CODE_BYTES: usize = 16;

/// A vCPU at the moment it stopped for good.
#[derive(Clone, Debug)]
pub struct CrashReport {
    /// Which vCPU.
    pub vcpu: u32,
    /// What led to it, in the engine's words.
    pub reason: String,
    /// Its registers.
    pub state: Box<CpuState>,
    /// The bytes at CS:RIP, as many as are mapped.
    pub code: Vec<u8>,
    /// Instructions it had retired.
    pub instructions: u64,
}

impl CrashReport {
    pub(crate) fn new(
        vcpu: u32,
        reason: String,
        state: CpuState,
        instructions: u64,
        memory: &GuestMemory,
    ) -> Self {
        let [_, cs, ..] = state.segments;
        let long_code = state.efer & Efer::LMA.bits() != 0 && cs.has(ringfence_x86::segment::attribute::LONG);
        let linear = if long_code { state.rip } else { cs.base.wrapping_add(state.rip) & 0xffff_ffff };
        let code = read_linear(memory, &state, linear, CODE_BYTES);
        Self { vcpu, reason, state: Box::new(state), code, instructions }
    }

    /// What the user can try, one suggestion a line.
    pub fn advice() -> &'static [&'static str] {
        &[
            "see more of what the kernel did: --append \"earlyprintk=serial,ttyS0 ignore_loglevel\"",
            "offer the guest a plainer CPU: --cpu x86-64-v2",
            "give it more memory: --memory 1G",
            "make sure that --initrd fits --kernel, and that both are complete",
        ]
    }
}

impl fmt::Display for CrashReport {
    /// Several lines: the reason, then the registers.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const GPR: [&str; 16] = [
            "RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", "R8 ", "R9 ", "R10", "R11", "R12", "R13",
            "R14", "R15",
        ];
        const SEGMENTS: [&str; 6] = ["ES", "CS", "SS", "DS", "FS", "GS"];
        let s = &self.state;
        writeln!(f, "vCPU {} after {} instructions: {}", self.vcpu, self.instructions, self.reason)?;
        for row in GPR.iter().zip(&s.gpr).collect::<Vec<_>>().chunks(4) {
            let cells: Vec<String> = row.iter().map(|(name, value)| format!("{name}={value:016x}")).collect();
            writeln!(f, "  {}", cells.join(" "))?;
        }
        writeln!(f, "  RIP={:016x} RFLAGS={:08x} {:?}", s.rip, s.rflags, s.activity)?;
        for (name, segment) in SEGMENTS.iter().zip(&s.segments).chain([(&"LD", &s.ldtr), (&"TR", &s.tr)]) {
            writeln!(
                f,
                "  {name} ={:04x} base={:016x} limit={:08x} attributes={:04x}",
                segment.selector.0, segment.base, segment.limit, segment.attributes
            )?;
        }
        for (name, table) in [("GDT", &s.gdtr), ("IDT", &s.idtr)] {
            writeln!(f, "  {name}  base={:016x} limit={:04x}", table.base, table.limit)?;
        }
        writeln!(f, "  CR0={:08x} CR2={:016x} CR3={:016x} CR4={:08x}", s.cr0, s.cr2, s.cr3, s.cr4)?;
        writeln!(f, "  EFER={:04x} DR6={:08x} DR7={:08x}", s.efer, s.dr6, s.dr7)?;
        if self.code.is_empty() {
            write!(f, "  code at RIP: not mapped")
        } else {
            let bytes: Vec<String> = self.code.iter().map(|byte| format!("{byte:02x}")).collect();
            write!(f, "  code at RIP: {}", bytes.join(" "))
        }
    }
}

#[cfg(test)]
mod tests {
    use ringfence_memory::GuestAddress;

    use super::*;

    #[test]
    fn report_shows_registers_and_code() {
        let memory = GuestMemory::flat(1 << 20).unwrap();
        memory.write(GuestAddress(0x8000), 0xf4fa_u16).unwrap();
        let mut state = CpuState { rip: 0x8000, cr2: 0xdead_beef, ..CpuState::default() };
        state.segments[1].base = 0;
        state.gpr[0] = 0x1234;
        let text = CrashReport::new(0, "#PF, then #DF".to_owned(), state, 42, &memory).to_string();
        for part in
            ["vCPU 0 after 42", "#PF, then #DF", "RAX=0000000000001234", "CR2=00000000deadbeef", "fa f4"]
        {
            assert!(text.contains(part), "{part}: {text}");
        }
    }
}
