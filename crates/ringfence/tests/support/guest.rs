//! Tiny guests: Multiboot kernels of a few bytes, so that a test of the machine needs no Linux.
//!
//! They run in 32-bit protected mode without paging, as Multiboot 1 enters them.

use tempfile::NamedTempFile;

/// Where the image is loaded. The header comes first, then the code.
const LOAD: u32 = 0x10_0000;
/// Eight 32-bit words of Multiboot header (Multiboot 0.6.96, 3.1.1), and room for a null descriptor table.
const CODE: u32 = LOAD + 48;
/// Six zero bytes that make an empty interrupt descriptor table.
const NO_TABLE: u32 = LOAD + 32;

const MAGIC: u32 = 0x1bad_b002;
/// The address fields of the header are valid.
const ADDRESSES: u32 = 1 << 16;

const SERIAL: u16 = 0x3f8;

/// Code in the making.
#[derive(Clone, Default)]
pub struct Guest(Vec<u8>);

impl Guest {
    pub fn new() -> Self {
        Self::default()
    }

    /// Raw machine code.
    pub fn code(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    fn port(self, port: u16) -> Self {
        self.code(&[0x66, 0xba]).code(&port.to_le_bytes())
    }

    /// `out port, al` with a constant.
    pub fn out8(self, port: u16, value: u8) -> Self {
        self.port(port).code(&[0xb0, value, 0xee])
    }

    /// `out port, ax` with a constant.
    pub fn out16(self, port: u16, value: u16) -> Self {
        self.port(port).code(&[0x66, 0xb8]).code(&value.to_le_bytes()).code(&[0x66, 0xef])
    }

    /// `out port, eax` with a constant.
    pub fn out32(self, port: u16, value: u32) -> Self {
        self.port(port).code(&[0xb8]).code(&value.to_le_bytes()).code(&[0xef])
    }

    /// Writes text to the first serial port, waiting for it before each byte.
    pub fn print(self, text: &str) -> Self {
        text.bytes().fold(self, |guest, byte| {
            // in al, dx; test al, 0x20; jz back
            guest.port(SERIAL + 5).code(&[0xec, 0xa8, 0x20, 0x74, 0xfb]).out8(SERIAL, byte)
        })
    }

    /// Writes the same byte to the serial port for ever.
    pub fn print_forever(self, byte: u8) -> Self {
        self.port(SERIAL).code(&[0xb0, byte, 0xee, 0xeb, 0xfd])
    }

    /// Waits for input without taking it.
    pub fn wait_for_input(self) -> Self {
        // Data terminal ready, request to send; then wait: in al, dx; test al, 1; jz wait.
        self.out8(SERIAL + 4, 3).port(SERIAL + 5).code(&[0xec, 0xa8, 0x01, 0x74, 0xfb])
    }

    /// Sends back what comes in, for ever.
    pub fn echo(self) -> Self {
        let guest = self.out8(SERIAL + 4, 3);
        // wait: mov dx, SERIAL+5; in al, dx; test al, 1; jz wait; mov dx, SERIAL; in al, dx; out dx, al; jmp wait
        guest
            .code(&[0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xf7])
            .code(&[0x66, 0xba, 0xf8, 0x03, 0xec, 0xee, 0xeb, 0xef])
    }

    /// Switches off through ACPI: SLP_TYP 5 and SLP_EN in the PM1 control register.
    pub fn power_off(self) -> Self {
        self.out16(0x604, (5 << 10) | (1 << 13)).spin()
    }

    /// Switches ACPI on and listens to the power button.
    pub fn listen_to_power_button(self) -> Self {
        self.out8(0xb2, 0xf1).out16(0x602, 1 << 8)
    }

    /// Waits for the power button.
    pub fn wait_for_power_button(self) -> Self {
        // in al, dx; test al, 1; jz back
        self.port(0x601).code(&[0xec, 0xa8, 0x01, 0x74, 0xfb])
    }

    /// Pulls the reset line.
    pub fn reset(self) -> Self {
        self.out8(0xcf9, 6).spin()
    }

    /// `if *address++ == 0 { first }`: runs `first` only the first time since memory was cleared. `first` must not
    /// return and be short.
    pub fn once(self, address: u32, first: Guest) -> Self {
        // inc dword [address]; cmp dword [address], 1; jne past
        let a = address.to_le_bytes();
        let skip = u8::try_from(first.0.len()).expect("short code").to_le_bytes();
        assert!(skip[0] < 128);
        self.code(&[0xff, 0x05])
            .code(&a)
            .code(&[0x83, 0x3d])
            .code(&a)
            .code(&[1, 0x75])
            .code(&skip)
            .code(&first.0)
    }

    /// Loops for ever.
    pub fn spin(self) -> Self {
        self.code(&[0xeb, 0xfe])
    }

    /// `cli; hlt`
    pub fn halt_for_good(self) -> Self {
        self.code(&[0xfa, 0xf4]).spin()
    }

    /// An undefined instruction with no interrupt descriptors: a triple fault.
    pub fn crash(self) -> Self {
        self.code(&[0x0f, 0x01, 0x1d]).code(&NO_TABLE.to_le_bytes()).code(&[0x0f, 0x0b])
    }

    /// The kernel's file.
    pub fn kernel(&self) -> NamedTempFile {
        let end = CODE + self.0.len() as u32;
        let header =
            [MAGIC, ADDRESSES, 0_u32.wrapping_sub(MAGIC).wrapping_sub(ADDRESSES), LOAD, LOAD, end, end, CODE];
        let mut image: Vec<u8> = header.iter().flat_map(|word| word.to_le_bytes()).collect();
        image.resize((CODE - LOAD) as usize, 0);
        image.extend(&self.0);
        super::file(&image)
    }
}
