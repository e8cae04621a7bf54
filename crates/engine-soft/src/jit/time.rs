//! RDTSC, RDTSCP and RDPID (SDM 2B) in translated code: the machine's time by the host's time-stamp counter, as
//! [`HostLine`] tells it.
//!
//! Where there is no such line (counted time, other hosts), where it changes at the moment, and where CR4.TSD may forbid the
//! instruction, it is the handler's.

use iced_x86::Code;
use ringfence_engine::HostLine;
use ringfence_x86::{Cr4, Gpr, msr};

use super::asm::{Imm, RAX, Reg, Two, at, cc};
use super::emit::Emitter;
use super::registers::{A, B};
use super::state::field;

const RCX: Reg = Reg(Gpr::Rcx as u8);
const RDX: Reg = Reg(Gpr::Rdx as u8);

impl Emitter<'_> {
    /// RDPID.
    pub(super) fn read_processor(&mut self, i: usize) -> Option<()> {
        let to = self.at(i).1.dst;
        self.a.rm32(Two::Load, A, field::msr(msr::TSC_AUX));
        self.put(to, A);
        Some(())
    }

    /// RDTSC and RDTSCP.
    pub(super) fn read_time(&mut self, i: usize) -> Option<()> {
        let ordered = self.at(i).1.code == Code::Rdtscp;
        self.keep_flags(i);
        self.host_flags = false;
        let [version, start, time, rate] =
            [HostLine::VERSION, HostLine::START, HostLine::TIME, HostLine::RATE]
                .map(|field| at(A, field as i32));
        let a = &mut self.a;
        a.test_imm32(field::cr4(), Cr4::TSD.bits() as u32);
        let mut sites = vec![a.jcc(cc::NE)];
        a.rm(Two::Load, A, field::time_line());
        a.rm(Two::Load, B, version);
        a.test_low(B, 1);
        sites.push(a.jcc(cc::NE));
        // From here on the handler succeeds if it is called, so RAX and RDX are free.
        if ordered {
            a.bytes(&[0x0f, 0xae, 0xe8]); // lfence
        }
        a.bytes(&[0x0f, 0x31]); // rdtsc
        a.bytes(&[0x48, 0xc1, 0xe2, 32]); // shl rdx, 32
        a.rr(Two::Or, RAX, RDX);
        a.rm(Two::Sub, RAX, start);
        // A counter before the start is far beyond the end.
        a.imm(Imm::Cmp, true, RAX, const { HostLine::REACH as i32 });
        sites.push(a.jcc(cc::A));
        a.multiply(rate);
        a.bytes(&[0x48, 0x0f, 0xac, 0xd0, 32]); // shrd rax, rdx, 32
        a.rm(Two::Add, RAX, time);
        a.rm(Two::Cmp, B, version);
        sites.push(a.jcc(cc::NE));
        a.rm(Two::Add, RAX, field::msr(msr::TSC_ADJUST));
        a.copy(RDX, RAX);
        a.shr(RDX, 32);
        a.rr32(Two::Load, RAX, RAX);
        if ordered {
            a.rm32(Two::Load, RCX, field::msr(msr::TSC_AUX));
        }
        self.slow(i, sites);
        Some(())
    }
}
