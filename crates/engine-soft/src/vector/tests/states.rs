//! The instructions that save and load state, against the host's.

use super::forms::{difference, load, random_state};
use super::generate::Random;
use super::native::{Native, NativeState};
use crate::vector::environment::Layout;
use crate::vector::features::FeatureSet;
use crate::vector::state::{Pointers, VectorUnit};
use crate::vector::xsave::{AREA, Save, Saved, View, XsaveLayout};

/// Rounds of every instruction.
const ROUNDS: u32 = 150;

/// The memory operand, with RBX pointing at it.
#[derive(Clone)]
#[repr(C, align(64))]
struct Area([u8; AREA]);

struct Fixture {
    native: Native,
    unit: VectorUnit,
    random: Random,
    layout: XsaveLayout,
    xcr0: u64,
}

impl Fixture {
    fn new(seed: u64) -> Self {
        let layout = XsaveLayout::from_cpuid(super::super::call::host_cpuid);
        let extended = FeatureSet::host().contains(iced_x86::CpuidFeature::AVX512F);
        let xcr0 = layout.supported() & if extended { 0xe7 } else { 7 };
        Self {
            native: Native::new(extended),
            unit: VectorUnit::new(false),
            random: Random::new(seed),
            layout,
            xcr0,
        }
    }

    /// A state with pointers, a quarter of the time with a pending x87 exception; and memory.
    fn start(&mut self) -> (NativeState, Box<Area>) {
        let random = &mut self.random;
        let mut state = random_state(random);
        if random.chance(25) {
            // Invalid operation, unmasked and raised.
            state.image.0[0] &= !1;
            state.image.0[2] |= 0x81;
            state.image.0[3] |= 0x80;
        }
        state.image.0[6..8].copy_from_slice(&(random.next() as u16 & 0x7ff).to_le_bytes());
        // Pointers of 32 bits, so that every layout shows the whole of them.
        state.image.0[8..12].copy_from_slice(&(random.next() as u32).to_le_bytes());
        state.image.0[16..20].copy_from_slice(&(random.next() as u32).to_le_bytes());
        let mut area = Box::new(Area([0; AREA]));
        area.0.fill_with(|| random.next() as u8);
        state.gpr[3] = area.0.as_ptr() as u64;
        (state, area)
    }

    /// Loads the unit as the native frame does the host.
    fn load(&mut self, state: &NativeState) {
        load(&mut self.unit, state);
        let bytes = &state.image.0;
        let mut image = [0; 512];
        image.copy_from_slice(bytes);
        image[24..28].copy_from_slice(&state.mxcsr.to_le_bytes());
        self.unit.pointers = Pointers::default();
        self.unit.fxrstor(&image, View { wide: true, long: true }, false).expect("a valid image");
    }

    /// Compares registers, and pointers where the host shows them.
    fn check(&mut self, name: &str, expected: &NativeState, state: &NativeState) {
        let wrong = difference(expected, &mut self.unit, state);
        assert!(wrong.is_none(), "{name}: {}", wrong.unwrap_or_default());
        let shown = self.unit.fxsave(View { wide: true, long: true }, false);
        assert_eq!(shown.bytes[6..24], expected.image.0[6..24], "{name}: pointers");
    }
}

fn apply(saved: &Saved, area: &mut Area) {
    for part in &saved.parts {
        area.0[part.clone()].copy_from_slice(&saved.bytes[part.clone()]);
    }
}

fn assert_memory(name: &str, host: &Area, unit: &Area) {
    if let Some(at) = (0..AREA).find(|&at| host.0[at] != unit.0[at]) {
        let end = (at + 16).min(AREA);
        panic!("{name}: at {at} host {:02x?}, unit {:02x?}", &host.0[at..end], &unit.0[at..end]);
    }
}

#[test]
fn environment_instructions_match_the_host() {
    let mut f = Fixture::new(0x5eed_0004);
    let layouts = [(true, &[][..]), (false, &[0x66][..])];
    for _ in 0..ROUNDS {
        for (wide, prefix) in layouts {
            let layout = Layout { wide, real: false };
            // ModRM [rbx] with each group's number: FNSTENV D9 /6, FLDENV D9 /4, FNSAVE DD /6, FRSTOR DD /4.
            for (name, opcode) in [
                ("fnstenv", [0xd9, 0x33]),
                ("fnsave", [0xdd, 0x33]),
                ("fldenv", [0xd9, 0x23]),
                ("frstor", [0xdd, 0x23]),
            ] {
                let (mut state, area) = f.start();
                if name.starts_with("fl") || name.starts_with("fr") {
                    // These wait, so nothing may be pending.
                    state.image.0[0] |= 0x3f;
                    state.image.0[2] &= 0x7f;
                    state.image.0[3] &= 0x7f;
                }
                f.load(&state);
                let mut mine = area.clone();
                let mut expected = state.clone();
                let code: Vec<u8> = prefix.iter().copied().chain(opcode).collect();
                f.native.run(&code, &mut expected);
                match name {
                    "fnstenv" => {
                        let bytes = f.unit.environment(layout);
                        mine.0[..layout.size()].copy_from_slice(&bytes[..layout.size()]);
                        f.unit.mask_x87();
                    }
                    "fnsave" => {
                        let bytes = f.unit.save_x87(layout);
                        mine.0[..layout.save_size()].copy_from_slice(&bytes[..layout.save_size()]);
                        f.unit.init_x87();
                    }
                    "fldenv" => {
                        let bytes = mine.0.first_chunk::<28>().expect("28 bytes");
                        f.unit.load_environment(bytes, layout);
                    }
                    _ => {
                        let bytes = mine.0.first_chunk::<108>().expect("108 bytes");
                        f.unit.restore_x87(bytes, layout);
                    }
                }
                let name = format!("{name} {}", layout.size());
                assert_memory(&name, &area, &mine);
                f.check(&name, &expected, &state);
            }
        }
        let (state, _area) = f.start();
        f.load(&state);
        let mut expected = state.clone();
        f.native.run(&[0xdb, 0xe3], &mut expected);
        f.unit.init_x87();
        f.check("fninit", &expected, &state);
    }
    f.unit.park();
}

#[test]
fn fxsave_and_fxrstor_match_the_host() {
    let mut f = Fixture::new(0x5eed_0005);
    for _ in 0..ROUNDS {
        for (wide, prefix) in [(false, &[][..]), (true, &[0x48][..])] {
            let view = View { wide, long: true };
            let (state, area) = f.start();
            f.load(&state);
            let mut mine = area.clone();
            let mut expected = state.clone();
            let code: Vec<u8> = prefix.iter().copied().chain([0x0f, 0xae, 0x03]).collect();
            f.native.run(&code, &mut expected);
            let mut saved = f.unit.fxsave(view, true);
            // The host's mask, not this guest's.
            saved.bytes[28..32].copy_from_slice(&area.0[28..32]);
            apply(&saved, &mut mine);
            assert_memory("fxsave", &area, &mine);
            f.check("fxsave", &expected, &state);

            let (state, mut area) = f.start();
            area.0[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
            f.load(&state);
            let mut expected = state.clone();
            let code: Vec<u8> = prefix.iter().copied().chain([0x0f, 0xae, 0x0b]).collect();
            f.native.run(&code, &mut expected);
            let bytes = area.0.first_chunk::<512>().expect("512 bytes");
            f.unit.fxrstor(bytes, view, true).expect("a valid image");
            f.check("fxrstor", &expected, &state);
        }
    }
    f.unit.park();
}

#[test]
fn xsave_family_matches_the_host() {
    let mut f = Fixture::new(0x5eed_0006);
    if f.xcr0 & 4 == 0 {
        return;
    }
    let host = FeatureSet::host();
    let mut kinds = vec![(Save::All, "xsave", vec![0x48, 0x0f, 0xae, 0x23])];
    if host.contains(iced_x86::CpuidFeature::XSAVEOPT) {
        kinds.push((Save::Optimised, "xsaveopt", vec![0x48, 0x0f, 0xae, 0x33]));
    }
    if host.contains(iced_x86::CpuidFeature::XSAVEC) {
        kinds.push((Save::Compacted, "xsavec", vec![0x48, 0x0f, 0xc7, 0x23]));
    }
    let view = View { wide: true, long: true };
    for _ in 0..ROUNDS {
        for (kind, name, code) in &kinds {
            let (mut state, area) = f.start();
            let mask = f.random.next() & f.xcr0;
            (state.gpr[0], state.gpr[2]) = (mask & 0xffff_ffff, mask >> 32);
            f.load(&state);
            let mut mine = area.clone();
            let mut expected = state.clone();
            let old = u64::from_le_bytes(*mine.0[512..].first_chunk().expect("eight bytes"));
            f.native.run(code, &mut expected);
            let mut saved = f.unit.xsave(&f.layout, *kind, mask, old, view);
            saved.bytes[28..32].copy_from_slice(&area.0[28..32]);
            apply(&saved, &mut mine);
            assert_memory(&format!("{name} {mask:x}"), &area, &mine);

            // And back, onto another state, with another mask.
            let (mut state, mut other) = f.start();
            let again = f.random.next() & f.xcr0;
            (state.gpr[0], state.gpr[2]) = (again & 0xffff_ffff, again >> 32);
            other.0 = mine.0;
            if *kind == Save::Compacted {
                other.0[528..576].fill(0);
            } else {
                other.0[520..576].fill(0);
                let bits = u64::from_le_bytes(*other.0[512..].first_chunk().expect("eight bytes")) & f.xcr0;
                other.0[512..520].copy_from_slice(&bits.to_le_bytes());
                if saved.parts.iter().all(|part| !part.contains(&24)) {
                    other.0[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
                }
            }
            f.load(&state);
            let mut expected = state.clone();
            f.native.run(&[0x48, 0x0f, 0xae, 0x2b], &mut expected);
            let header = other.0.first_chunk().expect("a header");
            let size =
                VectorUnit::xrstor_size(&f.layout, f.xcr0, again, header, None).expect("a valid header");
            assert!(size <= AREA);
            f.unit.xrstor(&f.layout, again, &other.0, view).expect("a valid image");
            f.check(&format!("xrstor {again:x} of {name} {mask:x}"), &expected, &state);
        }
    }
    f.unit.park();
}

#[test]
fn xsaveopt_skips_components_in_their_initial_state() {
    let layout = XsaveLayout::from_cpuid(super::super::call::host_cpuid);
    let view = View { wide: true, long: true };
    let mut unit = VectorUnit::new(false);
    unit.init_x87();
    unit.registers.zmm[3][0] = 7;
    let saved = unit.xsave(&layout, Save::Optimised, 7, 5, view);
    let header = u64::from_le_bytes(*saved.bytes[512..].first_chunk().expect("eight bytes"));
    assert_eq!(header, 2, "only XMM registers are in use; the old bits are replaced");
    assert!(saved.parts.iter().all(|part| part.start >= 24 && part.end <= 520));

    // The next image is in the same memory.
    unit.give_back(saved);
    let saved = unit.xsave(&layout, Save::Compacted, 5, u64::MAX, view);
    assert_eq!(saved.extent(), 512..528, "nothing but the header");
    assert_eq!(saved.bytes[520..528], (5u64 | 1 << 63).to_le_bytes());
}

#[test]
fn reserved_header_bits_are_refused() {
    let layout = XsaveLayout::from_cpuid(super::super::call::host_cpuid);
    let size = |edit: fn(&mut [u8; 576]), compacted| {
        let mut header = [0; 576];
        edit(&mut header);
        VectorUnit::xrstor_size(&layout, 7, 7, &header, compacted).is_ok()
    };
    assert!(size(|_| {}, None));
    assert!(size(|h| h[512] = 7, None));
    assert!(!size(|h| h[512] = 8, None), "a component that XCR0 does not have");
    assert!(!size(|h| h[520] = 1, None), "XCOMP_BV without its top bit");
    assert!(!size(|h| h[528] = 1, None), "a reserved byte");
    assert!(size(|h| h[536] = 1, None), "the standard format checks 24 bytes of the header");
    assert!(size(|h| (h[527], h[520], h[512]) = (0x80, 7, 5), None));
    assert!(!size(|h| (h[527], h[520], h[512]) = (0x80, 3, 4), None), "a component that the format lacks");
    assert!(!size(|h| (h[527], h[536]) = (0x80, 1), None), "the compacted format checks all of it");
    assert!(!size(|_| {}, Some(true)), "XRSTORS wants the compacted format");
}

#[test]
fn xcr0_must_be_consistent() {
    let layout = XsaveLayout::from_cpuid(super::super::call::host_cpuid);
    if layout.supported() & 4 == 0 {
        return;
    }
    for (value, accepted) in
        [(1, true), (3, true), (7, true), (0, false), (2, false), (5, false), (0x27, false)]
    {
        assert_eq!(layout.accepts(value), accepted, "{value:#x}");
    }
    assert!(!layout.accepts(1 << 63 | 1));
    assert_eq!(layout.accepts(0xe7), layout.supported() & 0xe0 == 0xe0);
}
