//! What is told when the two have come apart.

use std::fmt::Write;

use iced_x86::{Decoder, DecoderOptions, FlowControl, Formatter, GasFormatter};
use ringfence_memory::GuestAddress;

use super::compare::{Difference, registers};
use crate::interp::code_address::CodeAddress;
use crate::interp::cpu::Cpu;
use crate::interp::decode::translate_fetch;
use crate::jit::HostCode;

/// Most blocks whose code is shown.
const BLOCKS: usize = 6;
/// Most guest instructions shown of each.
const INSTRUCTIONS: usize = 72;
/// Most differences listed.
const DIFFERENCES: usize = 40;

/// A CPU at the start of what was compared.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Before {
    pub(super) regs: [u64; 18],
    pub(super) rflags: u64,
    pub(super) retired: u64,
}

/// What was compared.
#[derive(Clone, Debug)]
pub(super) struct Found {
    /// In a few words.
    pub(super) event: String,
    pub(super) before: Before,
    /// Instructions retired by the interpreter since.
    pub(super) retired: u64,
    pub(super) differences: Vec<Difference>,
}

/// A piece of guest code for the report.
pub(super) struct Block {
    /// Its linear address.
    pub(super) linear: u64,
    /// What is there, as far as it can be fetched.
    code: Vec<u8>,
    /// Where it lies.
    physical: Option<GuestAddress>,
    bits: u32,
}

impl Block {
    /// The code at a linear address, as `cpu` sees it now.
    pub(super) fn fetch(cpu: &mut Cpu, linear: u64) -> Self {
        let mut code = Vec::new();
        let physical = translate_fetch(cpu, linear).ok();
        if let Some(at) = physical {
            let rest = (0x1000 - at.page_offset()) as usize;
            code.resize(rest.min(15 * INSTRUCTIONS), 0);
            if cpu.memory.read_bytes(at, &mut code).is_err() {
                code.clear();
            }
        }
        Self { linear, code, physical, bits: cpu.code_size.bits() }
    }

    /// Where it is for the translator.
    pub(super) fn address(&self) -> Option<CodeAddress> {
        Some(CodeAddress::new(self.physical?, self.bits == 32))
    }
}

fn disassemble(text: &mut String, bits: u32, address: u64, code: &[u8], most: usize, to_branch: bool) {
    let mut formatter = GasFormatter::new();
    let mut line = String::new();
    let decoder = Decoder::with_ip(bits, code, address, DecoderOptions::NONE);
    let start = decoder.ip();
    for instruction in decoder.into_iter().take(most) {
        line.clear();
        formatter.format(&instruction, &mut line);
        let at = instruction.ip().wrapping_sub(start) as usize;
        let bytes = code.get(at..at + instruction.len()).unwrap_or_default();
        let bytes: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let _ = writeln!(text, "  {:016x}  {:<30} {line}", instruction.ip(), bytes.join(" "));
        if to_branch && instruction.flow_control() != FlowControl::Next {
            break;
        }
    }
}

/// The whole report. `blocks` are those that were executed, each with the host code made from it if there is any.
pub(super) fn text(found: &Found, blocks: &[(Block, Option<HostCode>)]) -> String {
    let Found { event, before, retired, differences } = found;
    let mut text = format!(
        "translator and interpreter have come apart {event}: {} instructions since they last agreed, at count {}\n",
        retired - before.retired,
        before.retired
    );
    text.push_str("\nwhat differs, interpreter / translator:\n");
    for Difference { what, interpreter, translator } in differences.iter().take(DIFFERENCES) {
        let _ = writeln!(text, "  {what}\n    {interpreter}\n    {translator}");
    }
    if differences.len() > DIFFERENCES {
        let _ = writeln!(text, "  and {} more", differences.len() - DIFFERENCES);
    }
    text.push_str("\nboth before:\n");
    text.push_str(&registers(&before.regs, before.rflags));
    let skipped = blocks.len().saturating_sub(BLOCKS);
    if skipped > 0 {
        let _ = writeln!(text, "\n{skipped} blocks, not shown");
    }
    for (block, host) in &blocks[skipped..] {
        let physical = block.physical.map_or_else(|| "nowhere".to_owned(), |at| format!("{:#x}", at.0));
        let _ = writeln!(text, "\nguest code at {:#x} (physical {physical}):", block.linear);
        let most = host.as_ref().map_or(INSTRUCTIONS, |host| host.instructions);
        disassemble(&mut text, block.bits, block.linear, &block.code, most, host.is_none());
        if let Some(HostCode { parts: [often, rarely], instructions }) = host {
            let length = often.1.len() + rarely.1.len();
            let _ = writeln!(text, "\ntranslated, {instructions} instructions to {length} bytes:");
            disassemble(&mut text, 64, often.0, &often.1, usize::MAX, false);
            text.push_str("\nof these rarely executed:\n");
            disassemble(&mut text, 64, rarely.0, &rarely.1, usize::MAX, false);
        }
    }
    text
}
