//! The registers behind base address register 0, and the device status' states (2.1, 3.1, 4.1.4).

use super::core::State;
use super::pci::VirtioPci;
use super::queue::{Broken, Queue};
use super::spec::{NO_VECTOR, common, feature, status};
use crate::device::lock;

/// A structure in the base address range.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part {
    pub(super) offset: u64,
    pub(super) len: u64,
}

/// Bytes in all.
pub(super) const SIZE: u64 = 0x4000;
pub(super) const COMMON: Part = Part { offset: 0, len: common::SIZE as u64 };
pub(super) const ISR: Part = Part { offset: 0x1000, len: 4 };
pub(super) const DEVICE: Part = Part { offset: 0x2000, len: 0x1000 };
pub(super) const NOTIFY: Part = Part { offset: 0x3000, len: 0x1000 };
/// Bytes between the notification registers of two queues.
pub(super) const NOTIFY_STEP: u32 = 4;

impl VirtioPci {
    pub(super) fn read_registers(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match offset {
            0x0000..0x1000 => {
                let image = self.common(&lock(&self.core.state));
                super::read_bytes(&image, offset, data);
            }
            0x1000 => {
                if let Some(first) = data.first_mut() {
                    *first = self.core.take_isr();
                }
            }
            0x2000..0x3000 => self.device.read_config(offset - DEVICE.offset, data),
            _ => (),
        }
    }

    pub(super) fn write_registers(&self, offset: u64, data: &[u8]) {
        match offset {
            0x0000..0x1000 => {
                let mut bytes = [0; 8];
                if let Some(to) = bytes.get_mut(..data.len()) {
                    to.copy_from_slice(data);
                    self.write_common(offset, data.len(), u64::from_le_bytes(bytes));
                }
            }
            0x2000..0x3000 => self.device.write_config(offset - DEVICE.offset, data),
            0x3000..0x4000 => {
                let step = u64::from(NOTIFY_STEP);
                let (queue, within) = ((offset - NOTIFY.offset) / step, (offset - NOTIFY.offset) % step);
                let running = within == 0 && {
                    let state = lock(&self.core.state);
                    state.is_running() && queue < state.queues.len() as u64
                };
                if running {
                    self.device.notify(queue as u16);
                }
            }
            _ => (),
        }
    }

    /// The common configuration as it reads now.
    fn common(&self, state: &State) -> [u8; common::SIZE] {
        let mut image = [0; common::SIZE];
        let mut put = |offset: u64, bytes: &[u8]| {
            for (to, from) in image.iter_mut().skip(offset as usize).zip(bytes) {
                *to = *from;
            }
        };
        let half = |features: u64, select: u32| match select {
            0 => features as u32,
            1 => (features >> 32) as u32,
            _ => 0,
        };
        put(common::DEVICE_FEATURE_SELECT, &state.device_feature_select.to_le_bytes());
        put(common::DEVICE_FEATURE, &half(self.core.features, state.device_feature_select).to_le_bytes());
        put(common::DRIVER_FEATURE_SELECT, &state.driver_feature_select.to_le_bytes());
        put(common::DRIVER_FEATURE, &half(state.driver_features, state.driver_feature_select).to_le_bytes());
        put(common::CONFIG_VECTOR, &state.config_vector.to_le_bytes());
        put(common::NUM_QUEUES, &(state.queues.len() as u16).to_le_bytes());
        put(common::STATUS, &[state.status]);
        put(common::GENERATION, &[state.generation]);
        put(common::QUEUE_SELECT, &state.queue_select.to_le_bytes());
        if let Some(queue) = state.queues.get(usize::from(state.queue_select)) {
            put(common::QUEUE_SIZE, &queue.size.to_le_bytes());
            put(common::QUEUE_VECTOR, &queue.vector.to_le_bytes());
            put(common::QUEUE_ENABLE, &u16::from(queue.enabled && !queue.resetting).to_le_bytes());
            put(common::QUEUE_NOTIFY_OFFSET, &state.queue_select.to_le_bytes());
            put(common::QUEUE_DESCRIPTORS, &queue.descriptors.to_le_bytes());
            put(common::QUEUE_DRIVER, &queue.driver.to_le_bytes());
            put(common::QUEUE_DEVICE, &queue.device.to_le_bytes());
            put(common::QUEUE_RESET, &u16::from(queue.resetting).to_le_bytes());
        } else {
            put(common::QUEUE_VECTOR, &NO_VECTOR.to_le_bytes());
        }
        image
    }

    /// A write of a whole register, or of half a 64-bit one; others are not defined and dropped.
    fn write_common(&self, offset: u64, len: usize, value: u64) {
        match (offset, len) {
            (common::STATUS, 1) => return self.set_status(value as u8),
            (common::QUEUE_RESET, 2) if value == 1 => return self.reset_queue(),
            _ => (),
        }
        let mut guard = lock(&self.core.state);
        let state = &mut *guard;
        let vector = if value < u64::from(self.core.vectors) { value as u16 } else { NO_VECTOR };
        match (offset, len) {
            (common::DEVICE_FEATURE_SELECT, 4) => state.device_feature_select = value as u32,
            (common::DRIVER_FEATURE_SELECT, 4) => state.driver_feature_select = value as u32,
            // Features are settled once they have been agreed on.
            (common::DRIVER_FEATURE, 4) if !state.has(status::FEATURES_OK) => {
                let features = &mut state.driver_features;
                match state.driver_feature_select {
                    0 => *features = *features & !0xffff_ffff | value,
                    1 => *features = *features & 0xffff_ffff | value << 32,
                    // None are offered there. Taken note of as one that is not, so that agreement fails.
                    _ => *features |= if value == 0 { 0 } else { 1 << 63 },
                }
            }
            (common::CONFIG_VECTOR, 2) => state.config_vector = vector,
            (common::QUEUE_SELECT, 2) => state.queue_select = value as u16,
            _ => self.write_queue(state, offset, len, value, vector),
        }
    }

    fn write_queue(&self, state: &mut State, offset: u64, len: usize, value: u64, vector: u16) {
        let agreed = state.has(status::FEATURES_OK);
        let Some(queue) = state.queues.get_mut(usize::from(state.queue_select)) else { return };
        if (offset, len) == (common::QUEUE_VECTOR, 2) {
            queue.vector = vector;
            return;
        }
        // What describes a queue stands while it is enabled.
        if queue.enabled || queue.resetting {
            return;
        }
        let address = |old: u64, base: u64| match (offset - base, len) {
            (0, 8) => value,
            (0, _) => old & !0xffff_ffff | value,
            _ => old & 0xffff_ffff | value << 32,
        };
        match (offset, len) {
            (common::QUEUE_SIZE, 2) => queue.size = value as u16,
            (common::QUEUE_ENABLE, 2) if value == 1 => {
                let fits = if agreed { queue.check(&self.core.memory) } else { Err(Broken::TooEarly) };
                queue.enabled = fits.is_ok();
                if let Err(why) = fits {
                    self.core.fail(state, why);
                }
            }
            (common::QUEUE_DESCRIPTORS, 4 | 8) | (0x24, 4) => {
                queue.descriptors = address(queue.descriptors, common::QUEUE_DESCRIPTORS);
            }
            (common::QUEUE_DRIVER, 4 | 8) | (0x2c, 4) => {
                queue.driver = address(queue.driver, common::QUEUE_DRIVER);
            }
            (common::QUEUE_DEVICE, 4 | 8) | (0x34, 4) => {
                queue.device = address(queue.device, common::QUEUE_DEVICE);
            }
            _ => (),
        }
    }

    /// The driver moves the device status on (2.1, 3.1.1). It cannot clear single bits.
    fn set_status(&self, value: u8) {
        if value == 0 {
            return self.begin_reset();
        }
        let mut state = lock(&self.core.state);
        if state.resetting {
            return;
        }
        let new = value & status::OF_DRIVER & !state.status;
        state.status |= new & (status::ACKNOWLEDGE | status::DRIVER | status::FAILED);
        if new & status::FEATURES_OK != 0 {
            let features = state.driver_features;
            // A driver that wants what there is not, or the legacy interface, finds the bit clear (2.2.2, 6.1).
            if features & !self.core.features == 0 && features & feature::VERSION_1 != 0 {
                state.status |= status::FEATURES_OK;
            }
        }
        if new & status::DRIVER_OK != 0 {
            if !state.has(status::FEATURES_OK) {
                return self.core.fail(&mut state, Broken::TooEarly);
            }
            state.status |= status::DRIVER_OK;
            let features = state.driver_features;
            drop(state);
            self.device.activate(features);
        }
    }

    /// The driver resets the device. Done when nothing is in flight; until then the status stays as it was.
    pub(super) fn begin_reset(&self) {
        lock(&self.core.state).resetting = true;
        self.device.stop(None, false);
        self.core.settle(lock(&self.core.state));
    }

    /// The driver resets the selected queue (2.6.1, 4.1.4.3).
    fn reset_queue(&self) {
        let mut state = lock(&self.core.state);
        let index = state.queue_select;
        let agreed = state.driver_features & feature::QUEUE_RESET != 0;
        let Some(queue) = state.queues.get_mut(usize::from(index)).filter(|q| agreed && q.enabled) else {
            return;
        };
        queue.resetting = true;
        state.postponed.retain(|(queue, ..)| *queue != index);
        drop(state);
        self.device.stop(Some(index), false);
        self.core.settle(lock(&self.core.state));
    }
}

impl Queue {
    /// Whether a saved queue can be one of a device that has `max` entries at most.
    pub(super) fn fits(&self, max: u16, memory: &ringfence_memory::GuestMemory) -> bool {
        self.max == max && (!self.enabled || self.check(memory).is_ok())
    }
}
