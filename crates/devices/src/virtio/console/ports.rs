//! The ports of a console device, as the device, the host's ends and their threads share them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use super::control::{Control, MESSAGE, Message, Role};
use super::reminder::Reminder;
use super::socket::Wake;
use super::{Port, Size};
use crate::device::lock;
use crate::serial::{SerialInput, SerialOutput};
use crate::virtio::Chain;

/// The queues of control messages (5.3.2): to the driver, and from it.
const TO_DRIVER: u16 = 2;
const FROM_DRIVER: u16 = 3;
/// Bytes of output in one chain at most. Drivers send some kilobytes; a vCPU must come back soon.
const LONGEST: u64 = 1 << 20;
/// Bytes of a chain that are copied at once.
const PIECE: usize = 16 << 10;
/// After this time from its first output a driver's console is up.
const START: Duration = Duration::from_secs(2);
/// After this time from its first output a driver's console takes input. Linux throws away what comes before.
const LISTENING: Duration = Duration::from_millis(500);
/// After this time a driver takes input that has said nothing.
const SILENT: Duration = Duration::from_secs(3);

/// The receive queue of a port; the one after it is the transmit queue (5.3.2).
fn receive_queue(id: usize) -> u16 {
    // There are few ports.
    if id == 0 { 0 } else { 2 + 2 * id as u16 }
}

/// The port that a queue belongs to, if it is no control queue.
fn port_of(queue: u16) -> Option<usize> {
    match queue {
        0 | 1 => Some(0),
        TO_DRIVER | FROM_DRIVER => None,
        _ => Some(usize::from(queue / 2 - 1)),
    }
}

type Waker = Box<dyn Fn() + Send + Sync>;

/// One port's way.
pub(super) struct Channel {
    output: Option<Arc<dyn SerialOutput>>,
    /// Bytes of the next chain that are out already. Held while chains go out.
    sent: Mutex<u64>,
    /// Held while chains come in.
    receiving: Mutex<()>,
    /// Somebody has bytes for the guest and waits for room.
    starving: AtomicBool,
    room: OnceLock<Waker>,
}

impl std::fmt::Debug for Channel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Channel(starving: {:?})", self.starving)
    }
}

impl Channel {
    pub(super) fn new(output: Option<Arc<dyn SerialOutput>>) -> Self {
        Self {
            output,
            sent: Mutex::default(),
            receiving: Mutex::default(),
            starving: AtomicBool::new(false),
            room: OnceLock::new(),
        }
    }

    /// Whether it has an end on the host.
    pub(super) fn exists(&self) -> bool {
        self.output.is_some()
    }

    /// How many bytes the host's end takes. Without one, all.
    pub(super) fn write(&self, bytes: &[u8]) -> usize {
        self.output.as_ref().map_or(bytes.len(), |output| output.write(bytes).min(bytes.len()))
    }

    pub(super) fn on_output_room(&self, wake: impl Fn() + Send + Sync + 'static) {
        if let Some(output) = &self.output {
            output.on_room(Box::new(wake));
        }
    }

    pub(super) fn sent(&self) -> u64 {
        *lock(&self.sent)
    }

    pub(super) fn set_sent(&self, sent: u64) {
        *lock(&self.sent) = sent;
    }

    /// Tells a source that there may be room.
    fn wake(&self) {
        if self.starving.swap(false, Ordering::SeqCst)
            && let Some(wake) = self.room.get()
        {
            wake();
        }
    }

    /// Writes what of a chain is not out yet. Whether all of it is.
    fn write_chain(&self, chain: &Chain, sent: &mut u64) -> bool {
        let mut buffer = [0; PIECE];
        loop {
            let read = chain.read(*sent, &mut buffer);
            if read == 0 {
                return true;
            }
            let taken = self.write(buffer.get(..read).unwrap_or_default());
            *sent += taken as u64;
            if taken < read {
                return false;
            }
        }
    }
}

/// What is known of the console's terminal.
#[derive(Debug, Default)]
struct Terminal {
    size: Size,
    /// The driver is to be told of the size.
    news: bool,
    /// When the driver first sent something, or was last held back while that was not long ago.
    spoke: Option<Instant>,
    /// Since when the driver is ready.
    ready: Option<Instant>,
}

impl Terminal {
    /// Whether the driver's console is sure to be up.
    fn is_up(&self) -> bool {
        self.spoke.is_some_and(|spoke| spoke.elapsed() >= START)
    }

    /// Whether input would be thrown away.
    fn is_deaf(&self) -> bool {
        self.ready.is_some_and(|ready| ready.elapsed() < SILENT)
            && self.spoke.is_none_or(|spoke| spoke.elapsed() < LISTENING)
    }
}

/// The ports.
#[derive(Debug)]
pub(super) struct Ports {
    pub(super) channels: Vec<Channel>,
    pub(super) control: Mutex<Control>,
    pub(super) port: OnceLock<Port>,
    /// Held while a chain is on its way; true from the time when the device is to be saved until the driver is heard of again.
    pub(super) stopped: Mutex<bool>,
    /// The driver knows of more ports than one.
    pub(super) multiport: AtomicBool,
    terminal: Mutex<Terminal>,
    /// The thread of sockets.
    pub(super) thread: OnceLock<Arc<Wake>>,
    /// That of a console, which tells the driver what it has not found by itself.
    pub(super) reminder: Option<Reminder>,
}

impl Ports {
    pub(super) fn new(channels: Vec<Channel>, roles: Vec<Role>, size: Size) -> Self {
        let reminder = channels.first().is_some_and(Channel::exists).then(Reminder::default);
        let mut control = Control::new(roles);
        control.resize(size);
        Self {
            channels,
            control: Mutex::new(control),
            port: OnceLock::new(),
            stopped: Mutex::default(),
            multiport: AtomicBool::new(false),
            terminal: Mutex::new(Terminal { size, ..Terminal::default() }),
            thread: OnceLock::new(),
            reminder,
        }
    }

    pub(super) fn size(&self) -> Size {
        lock(&self.terminal).size
    }

    /// Somebody has come to a port's end on the host, or gone.
    pub(super) fn connect(&self, id: usize, connected: bool) {
        lock(&self.control).connect(id, connected);
        // What was for somebody who is gone is for nobody.
        self.transmit(id);
        self.tell();
    }

    /// The device goes away.
    pub(super) fn end(&self) {
        if let Some(thread) = self.thread.get() {
            thread.end();
        }
        if let Some(reminder) = &self.reminder {
            reminder.end();
        }
    }

    /// The driver, or one of its queues, begins anew.
    pub(super) fn forget(&self, queue: Option<u16>) {
        match queue.map(port_of) {
            None => {
                lock(&self.control).reset();
                self.channels.iter().for_each(|channel| channel.set_sent(0));
                *lock(&self.terminal) = Terminal { size: self.size(), ..Terminal::default() };
            }
            Some(Some(id)) if queue != Some(receive_queue(id)) => {
                if let Some(channel) = self.channels.get(id) {
                    channel.set_sent(0);
                }
            }
            Some(_) => {}
        }
    }

    /// The driver is ready.
    pub(super) fn begin(&self) {
        lock(&self.terminal).ready = Some(Instant::now());
        if let Some(reminder) = &self.reminder {
            reminder.ask();
        }
        self.go_on();
    }

    /// Whether the console's driver would throw input away, and whoever has some is to wait.
    pub(super) fn is_deaf(&self) -> bool {
        !self.multiport.load(Ordering::SeqCst) && lock(&self.terminal).is_deaf()
    }

    /// Tells whoever has input for the console that it may be taken now.
    pub(super) fn ask_for_input(&self) {
        self.channels.iter().take(1).for_each(Channel::wake);
    }

    /// Takes up everything that may have waited for the driver.
    pub(super) fn go_on(&self) {
        self.tell();
        for (id, channel) in self.channels.iter().enumerate() {
            self.transmit(id);
            channel.wake();
        }
    }

    pub(super) fn notify(&self, queue: u16) {
        match port_of(queue) {
            None if !self.multiport.load(Ordering::SeqCst) => {}
            None if queue == FROM_DRIVER => self.listen(),
            None => self.tell(),
            Some(id) if queue == receive_queue(id) => {
                if let Some(channel) = self.channels.get(id) {
                    channel.wake();
                }
            }
            Some(id) => {
                self.transmit(id);
                if id == 0 {
                    let mut terminal = lock(&self.terminal);
                    if !terminal.is_up() && (terminal.spoke.is_none() || self.is_held_back()) {
                        terminal.spoke = Some(Instant::now());
                    }
                }
            }
        }
        self.tell_size();
    }

    /// Whether output of the console waits for room.
    fn is_held_back(&self) -> bool {
        self.port.get().is_some_and(|port| port.has_chains(receive_queue(0) + 1))
    }

    /// Takes the next chain of a queue and does `work` with it, unless the device is to stand still. Whether there was one.
    fn with_chain(&self, queue: u16, work: impl FnOnce(&Port, Chain) -> bool) -> bool {
        let stopped = lock(&self.stopped);
        if *stopped {
            return false;
        }
        let Some(port) = self.port.get() else { return false };
        let Some(chain) = port.take(queue) else { return false };
        work(port, chain)
    }

    /// Takes what the driver has to say of its ports.
    fn listen(&self) {
        while self.with_chain(FROM_DRIVER, |port, chain| {
            let mut bytes = [0; MESSAGE];
            if chain.read(0, &mut bytes) < MESSAGE {
                port.fail("a control message is shorter than one");
                return false;
            }
            chain.complete(0);
            let taken = lock(&self.control).take(Message::from_bytes(bytes));
            if let Err(why) = taken {
                port.fail(why);
            }
            taken.is_ok()
        }) {}
        self.tell();
        // Somebody may have opened a port.
        self.channels.iter().for_each(Channel::wake);
    }

    /// Tells the driver what it is to know of its ports, as far as it has buffers for it.
    fn tell(&self) {
        if !self.multiport.load(Ordering::SeqCst) {
            return;
        }
        while self.with_chain(TO_DRIVER, |port, chain| {
            let Some(message) = lock(&self.control).next() else {
                chain.put_back();
                return false;
            };
            if chain.writable_len() < message.len() as u64 {
                port.fail("a buffer for control messages has no room for one");
                return false;
            }
            let written = chain.write(0, &message);
            chain.complete(written as u32);
            true
        }) {}
    }

    /// Sends what the guest has written to a port, until there is no more or the host's end has no room.
    pub(super) fn transmit(&self, id: usize) {
        let Some(channel) = self.channels.get(id) else { return };
        let mut sent = lock(&channel.sent);
        while self.with_chain(receive_queue(id) + 1, |port, chain| {
            if chain.readable_len() > LONGEST {
                port.fail("a chain has more than 1 MiB of output");
                return false;
            }
            if self.is_for_somebody(id) && !channel.write_chain(&chain, &mut sent) {
                chain.put_back();
                return false;
            }
            *sent = 0;
            match &self.reminder {
                // Linux waits in a loop for what its console has sent.
                Some(reminder) if id == 0 => {
                    chain.complete_untold(0);
                    reminder.ask();
                }
                _ => chain.complete(0),
            }
            true
        }) {}
    }

    /// Tells the driver of the console's output that is out, unless it knows.
    pub(super) fn remind(&self) {
        if let Some(port) = self.port.get() {
            port.remind(receive_queue(0) + 1);
        }
    }

    fn is_for_somebody(&self, id: usize) -> bool {
        !self.multiport.load(Ordering::SeqCst) || lock(&self.control).carries_out(id)
    }

    /// Hands bytes from the front of `bytes` to the guest; how many it took. The source is woken when there is room after it took
    /// fewer than all.
    pub(super) fn receive(&self, id: usize, bytes: &[u8]) -> usize {
        let Some(channel) = self.channels.get(id) else { return 0 };
        let _order = lock(&channel.receiving);
        // Before looking, so that no room that comes meanwhile is missed.
        channel.starving.store(true, Ordering::SeqCst);
        if self.multiport.load(Ordering::SeqCst) && !lock(&self.control).carries_in(id) {
            return 0;
        }
        if id == 0 && self.is_deaf() {
            return 0;
        }
        let mut done = 0;
        while done < bytes.len()
            && self.with_chain(receive_queue(id), |port, chain| {
                let written = chain.write(0, bytes.get(done..).unwrap_or_default());
                if written == 0 {
                    port.fail("a buffer for input has no room");
                    return false;
                }
                chain.complete(written as u32);
                done += written;
                true
            })
        {}
        if done == bytes.len() {
            channel.starving.store(false, Ordering::SeqCst);
        }
        done
    }

    /// Whom to wake when a port has room for input.
    pub(super) fn on_room(&self, id: usize, wake: Waker) {
        if let Some(channel) = self.channels.get(id) {
            let _ = channel.room.set(wake);
        }
    }

    /// Tells the driver of a new size, if there is one and the console is sure to be up.
    fn tell_size(&self) {
        let mut terminal = lock(&self.terminal);
        let multiport = self.multiport.load(Ordering::SeqCst);
        if !terminal.news || !(multiport || terminal.is_up()) {
            return;
        }
        terminal.news = false;
        let size = terminal.size;
        drop(terminal);
        if multiport {
            lock(&self.control).resize(size);
            self.tell();
        } else if let Some(port) = self.port.get() {
            port.config_changed();
        }
    }
}

impl SerialInput for Ports {
    fn input(&self, bytes: &[u8]) -> usize {
        self.receive(0, bytes)
    }

    fn on_input_room(&self, wake: Waker) {
        self.on_room(0, wake);
    }

    fn resize(&self, columns: u16, rows: u16) {
        let mut terminal = lock(&self.terminal);
        let size = Size { columns, rows };
        terminal.news |= terminal.size != size;
        terminal.size = size;
        drop(terminal);
        self.tell_size();
    }
}
