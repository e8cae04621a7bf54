//! Whether two CPUs are in the same state, and where they are not.

use crate::interp::cpu::Cpu;
use crate::interp::op::RIP;

const NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15",
];
const SEGMENTS: [&str; 6] = ["es", "cs", "ss", "ds", "fs", "gs"];

/// Something that is not the same on both sides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Difference {
    pub(super) what: String,
    pub(super) interpreter: String,
    pub(super) translator: String,
}

impl Difference {
    pub(super) fn new(
        what: impl Into<String>,
        interpreter: impl Into<String>,
        translator: impl Into<String>,
    ) -> Self {
        Self { what: what.into(), interpreter: interpreter.into(), translator: translator.into() }
    }
}

/// Whether all of two CPUs' state that a guest can come to see is the same. Both have parked their x87 units.
pub(super) fn same(a: &Cpu, b: &Cpu) -> bool {
    a.regs[..=RIP] == b.regs[..=RIP]
        && a.retired == b.retired
        && a.status.canonical() == b.status.canonical()
        && a.flags == b.flags
        && a.vector.unit.same(&b.vector.unit)
        && a.vector.xcr0() == b.vector.xcr0()
        && (a.cpl, a.code_size, a.activity) == (b.cpl, b.code_size, b.activity)
        && (a.interrupt_shadow, a.nmi_masked) == (b.interrupt_shadow, b.nmi_masked)
        && a.segments == b.segments
        && (a.ldtr, a.tr, a.gdtr, a.idtr) == (b.ldtr, b.tr, b.gdtr, b.idtr)
        && (a.cr0, a.cr2, a.cr3, a.cr4, a.efer) == (b.cr0, b.cr2, b.cr3, b.cr4, b.efer)
        && (a.pdpte, a.dr, a.dr6, a.dr7) == (b.pdpte, b.dr, b.dr6, b.dr7)
        && a.msrs == b.msrs
        && a.system == b.system
}

/// The differences between two CPUs, those of most interest first.
pub(super) fn differences(a: &Cpu, b: &Cpu) -> Vec<Difference> {
    let mut found = Vec::new();
    let mut hex = |what: &str, a: u64, b: u64| {
        if a != b {
            found.push(Difference::new(what, format!("{a:#x}"), format!("{b:#x}")));
        }
    };
    hex("rip", a.regs[RIP], b.regs[RIP]);
    for (i, name) in NAMES.into_iter().enumerate() {
        hex(name, a.regs[i], b.regs[i]);
    }
    hex("cr0", a.cr0.bits(), b.cr0.bits());
    hex("cr2", a.cr2, b.cr2);
    hex("cr3", a.cr3, b.cr3);
    hex("cr4", a.cr4.bits(), b.cr4.bits());
    hex("efer", a.efer.bits(), b.efer.bits());
    hex("cpl", a.cpl.into(), b.cpl.into());
    for i in 0..4 {
        hex(&format!("dr{i}"), a.dr[i], b.dr[i]);
        hex(&format!("page-directory pointer {i}"), a.pdpte[i], b.pdpte[i]);
    }
    hex("dr6", a.dr6, b.dr6);
    hex("dr7", a.dr7, b.dr7);
    let numbers = [a, b].map(|cpu| cpu.msrs.to_map().into_keys());
    for number in numbers.into_iter().flatten().collect::<std::collections::BTreeSet<_>>() {
        let value = |cpu: &Cpu| cpu.msrs.get(number).unwrap_or_default();
        hex(&format!("MSR {number:#x}"), value(a), value(b));
    }
    vectors(a, b, &mut hex);

    if a.rflags() != b.rflags() {
        let flags = |cpu: &Cpu| {
            let bits = cpu.rflags();
            format!("{bits:#x} {}", flag_names(bits))
        };
        found.insert(0, Difference::new("rflags", flags(a), flags(b)));
    }
    let mut debug = |what: &str, a: &dyn std::fmt::Debug, b: &dyn std::fmt::Debug| {
        let (a, b) = (format!("{a:x?}"), format!("{b:x?}"));
        if a != b {
            found.push(Difference::new(what, a, b));
        }
    };
    for (i, name) in SEGMENTS.into_iter().enumerate() {
        debug(name, &a.segments[i], &b.segments[i]);
    }
    debug("ldtr", &a.ldtr, &b.ldtr);
    debug("tr", &a.tr, &b.tr);
    debug("gdtr", &a.gdtr, &b.gdtr);
    debug("idtr", &a.idtr, &b.idtr);
    debug("code size", &a.code_size, &b.code_size);
    debug("activity", &a.activity, &b.activity);
    debug("interrupt shadow", &a.interrupt_shadow, &b.interrupt_shadow);
    debug("NMI masked", &a.nmi_masked, &b.nmi_masked);
    debug("what system instructions keep", &a.system, &b.system);
    let count = |cpu: &Cpu| cpu.retired.to_string();
    if a.retired != b.retired {
        found.insert(0, Difference::new("instructions retired", count(a), count(b)));
    }
    found
}

fn vectors(a: &Cpu, b: &Cpu, hex: &mut impl FnMut(&str, u64, u64)) {
    let (left, right) = (a.vector.unit.vector_state(), b.vector.unit.vector_state());
    for (i, (l, r)) in left.zmm.iter().zip(&right.zmm).enumerate() {
        for (part, (l, r)) in l.iter().zip(r).enumerate() {
            hex(&format!("zmm{i} bits {} to {}", 64 * part, 64 * part + 63), *l, *r);
        }
    }
    for (i, (l, r)) in left.k.iter().zip(&right.k).enumerate() {
        hex(&format!("k{i}"), *l, *r);
    }
    hex("mxcsr", left.mxcsr.into(), right.mxcsr.into());
    let (left, right) = (a.vector.unit.x87(), b.vector.unit.x87());
    hex("x87 control", left.fcw.into(), right.fcw.into());
    hex("x87 status", left.fsw.into(), right.fsw.into());
    hex("x87 tags", left.ftw.into(), right.ftw.into());
    hex("x87 opcode", left.fop.into(), right.fop.into());
    hex("x87 instruction pointer", left.fip, right.fip);
    hex("x87 data pointer", left.fdp, right.fdp);
    hex("x87 code selector", left.fcs.into(), right.fcs.into());
    hex("x87 data selector", left.fds.into(), right.fds.into());
    for (i, (l, r)) in left.st.iter().zip(&right.st).enumerate() {
        hex(&format!("st({i}) significand"), l[0], r[0]);
        hex(&format!("st({i}) sign and exponent"), l[1], r[1]);
    }
    hex("xcr0", a.vector.xcr0(), b.vector.xcr0());
}

/// The flags that are set, by name.
pub(super) fn flag_names(rflags: u64) -> String {
    const FLAGS: [(u32, &str); 16] = [
        (0, "CF"),
        (2, "PF"),
        (4, "AF"),
        (6, "ZF"),
        (7, "SF"),
        (8, "TF"),
        (9, "IF"),
        (10, "DF"),
        (11, "OF"),
        (14, "NT"),
        (16, "RF"),
        (17, "VM"),
        (18, "AC"),
        (19, "VIF"),
        (20, "VIP"),
        (21, "ID"),
    ];
    let names: Vec<_> = FLAGS.iter().filter(|(bit, _)| rflags >> bit & 1 != 0).map(|(_, n)| *n).collect();
    format!("[{}]", names.join(" "))
}

/// The integer state in a few lines.
pub(super) fn registers(regs: &[u64; 18], rflags: u64) -> String {
    let mut text = String::new();
    for row in 0..4 {
        for i in 4 * row..4 * row + 4 {
            text.push_str(&format!("  {:>3} {:016x}", NAMES[i], regs[i]));
        }
        text.push('\n');
    }
    text.push_str(&format!("  rip {:016x}  rflags {rflags:x} {}\n", regs[RIP], flag_names(rflags)));
    text
}
