//! Control messages (5.3.6.2): what ports there are, what they are, and who has them open.
//!
//! Nothing waits in a queue here. What the driver is to be told follows from what it has been told and from how things are, so a
//! driver that takes no messages, or asks for them again and again, costs no memory.

use serde::{Deserialize, Serialize};

use super::Size;

/// Events of control messages (5.3.6.2).
pub(super) mod event {
    pub(in super::super) const DEVICE_READY: u16 = 0;
    pub(in super::super) const DEVICE_ADD: u16 = 1;
    pub(in super::super) const PORT_READY: u16 = 3;
    pub(in super::super) const CONSOLE_PORT: u16 = 4;
    pub(in super::super) const RESIZE: u16 = 5;
    pub(in super::super) const PORT_OPEN: u16 = 6;
    pub(in super::super) const PORT_NAME: u16 = 7;
}

/// Bytes of a message without what may follow it: `struct virtio_console_control`.
pub(super) const MESSAGE: usize = 8;

/// A message: port, event, value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) port: u32,
    pub(super) event: u16,
    pub(super) value: u16,
}

impl Message {
    pub(super) fn from_bytes(bytes: [u8; MESSAGE]) -> Self {
        let number = u64::from_le_bytes(bytes);
        Self { port: number as u32, event: (number >> 32) as u16, value: (number >> 48) as u16 }
    }

    pub(super) fn to_bytes(self) -> [u8; MESSAGE] {
        let number = u64::from(self.port) | u64::from(self.event) << 32 | u64::from(self.value) << 48;
        number.to_le_bytes()
    }
}

/// A message of the driver that makes no sense.
pub(super) const NO_SUCH_PORT: &str = "a control message is about a port that is not there";

/// Who is at the host's end of a port: each connection has a number of its own. [`FOR_GOOD`] is always there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Connection(Option<u32>);

/// The number of an end that nobody comes to or goes from.
const FOR_GOOD: u32 = 0;
/// That of one of another life.
const PAST: u32 = u32::MAX;

/// What driver and host know of a port.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct PortState {
    /// The driver is to be told that there is the port.
    add: bool,
    /// It is to be told that the port is a console.
    console: bool,
    /// It is to be told the port's name.
    name: bool,
    /// It is to be told the console's size.
    resize: bool,
    /// The driver has the port.
    ready: bool,
    /// A program of the guest has it open.
    open: bool,
    /// The connection that the driver knows of.
    told: Connection,
    /// The one there is.
    #[serde(skip)]
    now: Connection,
}

/// What a port is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// The first one of a device without a console: never announced.
    Missing,
    Console,
    Named(String),
}

/// All ports of a device.
#[derive(Debug)]
pub(super) struct Control {
    roles: Vec<Role>,
    ports: Vec<PortState>,
    /// The number of the last connection.
    last: u32,
    size: Size,
}

impl Control {
    pub(super) fn new(roles: Vec<Role>) -> Self {
        let ports = vec![PortState::default(); roles.len()];
        Self { roles, ports, last: 0, size: Size::default() }
    }

    /// The driver begins anew.
    pub(super) fn reset(&mut self) {
        for port in &mut self.ports {
            *port = PortState { now: port.now, ..PortState::default() };
        }
    }

    /// Takes a message of the driver.
    pub(super) fn take(&mut self, message: Message) -> Result<(), &'static str> {
        if message.event == event::DEVICE_READY {
            // With 0 the driver says that it cannot go on.
            for (port, role) in self.ports.iter_mut().zip(&self.roles) {
                port.add = message.value == 1 && *role != Role::Missing;
            }
            return Ok(());
        }
        let index = usize::try_from(message.port).map_err(|_| NO_SUCH_PORT)?;
        let there = self.ports.get_mut(index).zip(self.roles.get(index));
        let (port, role) = there.filter(|(_, role)| **role != Role::Missing).ok_or(NO_SUCH_PORT)?;
        match message.event {
            event::PORT_READY => {
                let ready = message.value == 1;
                *port = PortState {
                    ready,
                    console: ready && *role == Role::Console,
                    name: ready && matches!(role, Role::Named(_)),
                    resize: ready && *role == Role::Console && self.size != Size::default(),
                    now: port.now,
                    ..PortState::default()
                };
            }
            event::PORT_OPEN => port.open = message.value == 1,
            // Others are not for drivers to send, or not known yet.
            _ => {}
        }
        Ok(())
    }

    /// What the driver is to be told next, as bytes, and that it has been told.
    pub(super) fn next(&mut self) -> Option<Vec<u8>> {
        let (roles, size) = (&self.roles, self.size);
        (0..).zip(&mut self.ports).zip(roles).find_map(|((id, port), role)| {
            let (event, value, rest) = port.next(role, size)?;
            let mut bytes = Message { port: id, event, value }.to_bytes().to_vec();
            bytes.extend(rest);
            Some(bytes)
        })
    }

    /// A port's end on the host is always there.
    pub(super) fn connect_for_good(&mut self, id: usize) {
        if let Some(port) = self.ports.get_mut(id) {
            port.now = Connection(Some(FOR_GOOD));
        }
    }

    /// Somebody has come to a port's end on the host, or gone.
    pub(super) fn connect(&mut self, id: usize, connected: bool) {
        self.last = self.last % (PAST - 1) + 1;
        if let Some(port) = self.ports.get_mut(id) {
            port.now = Connection(connected.then_some(self.last));
        }
    }

    /// The console has another size.
    pub(super) fn resize(&mut self, size: Size) {
        self.size = size;
        if let (Some(Role::Console), Some(port)) = (self.roles.first(), self.ports.first_mut()) {
            port.resize = port.ready;
        }
    }

    /// Whether what comes from the guest by a port is for whoever is there now.
    pub(super) fn carries_out(&self, id: usize) -> bool {
        self.ports.get(id).is_some_and(|port| port.now.0.is_some() && port.told == port.now)
    }

    /// Whether the guest takes what comes by a port.
    pub(super) fn carries_in(&self, id: usize) -> bool {
        self.carries_out(id) && self.ports.get(id).is_some_and(|port| port.open)
    }

    pub(super) fn save(&self) -> Vec<PortState> {
        self.ports.clone()
    }

    /// Names of the ports, in order.
    pub(super) fn names(&self) -> Vec<String> {
        let name = |role: &Role| match role {
            Role::Missing => String::new(),
            Role::Console => "console".to_owned(),
            Role::Named(name) => format!("port {name}"),
        };
        self.roles.iter().map(name).collect()
    }

    /// Loads what [`Control::save`] gave. Whoever was connected then is gone.
    pub(super) fn restore(&mut self, saved: Vec<PortState>) -> bool {
        let fits =
            |(role, port): (&Role, &PortState)| *role != Role::Missing || *port == PortState::default();
        if saved.len() != self.ports.len() || !self.roles.iter().zip(&saved).all(fits) {
            return false;
        }
        for (port, saved) in self.ports.iter_mut().zip(saved) {
            let same = port.now.0 == Some(FOR_GOOD);
            let told = Connection(saved.told.0.map(|_| if same { FOR_GOOD } else { PAST }));
            *port = PortState { now: port.now, told, ..saved };
        }
        true
    }
}

impl PortState {
    /// Event and value of the next message about the port, and what follows it.
    fn next(&mut self, role: &Role, size: Size) -> Option<(u16, u16, Vec<u8>)> {
        let due = |flag: &mut bool| std::mem::take(flag);
        if due(&mut self.add) {
            return Some((event::DEVICE_ADD, 1, Vec::new()));
        }
        if !self.ready {
            return None;
        }
        if due(&mut self.console) {
            return Some((event::CONSOLE_PORT, 1, Vec::new()));
        }
        if due(&mut self.name)
            && let Role::Named(name) = role
        {
            return Some((event::PORT_NAME, 1, name.as_bytes().to_vec()));
        }
        if due(&mut self.resize) {
            // `struct virtio_console_resize` (5.3.6.2).
            return Some((event::RESIZE, 1, [size.columns, size.rows].map(u16::to_le_bytes).concat()));
        }
        if self.told == self.now {
            return None;
        }
        // A driver that has missed that somebody went hears of it before somebody else is there.
        self.told = if self.told.0.is_some() { Connection(None) } else { self.now };
        Some((event::PORT_OPEN, self.told.0.is_some().into(), Vec::new()))
    }
}
