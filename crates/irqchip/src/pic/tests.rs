use super::*;

/// A pair set up as PC operating systems do: vectors 20H and 28H, nothing masked.
fn pair() -> PicPair {
    pair_with_icw4(0x01)
}

fn pair_with_icw4(icw4: u8) -> PicPair {
    let mut pic = PicPair::new();
    for (controller, base, cascade) in [(0, 0x20, 4), (1, 0x28, 2)] {
        pic.write(controller, 0, 0x11);
        pic.write(controller, 1, base);
        pic.write(controller, 1, cascade);
        pic.write(controller, 1, icw4);
        pic.write(controller, 1, 0x00);
    }
    pic
}

fn pulse(pic: &mut PicPair, irq: u8) {
    pic.set_irq(irq, true);
    pic.set_irq(irq, false);
}

fn isr(pic: &mut PicPair, controller: usize) -> u8 {
    pic.write(controller, 0, 0x0b);
    pic.read(controller, 0)
}

fn irr(pic: &mut PicPair, controller: usize) -> u8 {
    pic.write(controller, 0, 0x0a);
    pic.read(controller, 0)
}

#[test]
fn initialization_takes_words_in_order_and_clears_the_mask() {
    let mut pic = PicPair::new();
    pic.write(0, 1, 0xff);
    assert_eq!(pic.read(0, 1), 0xff);
    pic.write(0, 0, 0x11);
    assert_eq!(pic.read(0, 1), 0x00);
    pic.write(0, 1, 0x47);
    pic.write(0, 1, 0x04);
    pic.write(0, 1, 0x01);
    pic.write(0, 1, 0xfa);
    assert_eq!(pic.read(0, 1), 0xfa);
    pulse(&mut pic, 0);
    assert!(pic.output());
    assert_eq!(pic.acknowledge(), 0x40, "the low three bits of ICW2 do not count");
}

#[test]
fn initialization_without_icw3_and_icw4_ends_after_icw2() {
    let mut pic = PicPair::new();
    pic.write(0, 0, 0x12);
    pic.write(0, 1, 0x30);
    pic.write(0, 1, 0x55);
    assert_eq!(pic.read(0, 1), 0x55);
}

#[test]
fn initialization_forgets_edges_but_not_levels() {
    let mut pic = pair();
    pic.write_elcr(0, 0x20);
    pic.set_irq(5, true);
    pic.set_irq(4, true);
    assert_eq!(irr(&mut pic, 0), 0x30);
    pic.write(0, 0, 0x11);
    for word in [0x20, 4, 1] {
        pic.write(0, 1, word);
    }
    assert_eq!(irr(&mut pic, 0), 0x20);
}

#[test]
fn lower_input_has_priority_and_nests() {
    let mut pic = pair();
    pulse(&mut pic, 3);
    pulse(&mut pic, 1);
    assert_eq!(pic.acknowledge(), 0x21);
    assert!(!pic.output(), "3 waits for 1");
    pulse(&mut pic, 0);
    assert!(pic.output(), "0 interrupts 1");
    assert_eq!(pic.acknowledge(), 0x20);
    assert_eq!(isr(&mut pic, 0), 0x03);
    pic.write(0, 0, 0x20);
    assert_eq!(isr(&mut pic, 0), 0x02, "non-specific end of interrupt ends the highest");
    assert!(!pic.output());
    pic.write(0, 0, 0x61);
    assert!(pic.output());
    assert_eq!(pic.acknowledge(), 0x23);
}

#[test]
fn masked_edge_is_remembered() {
    let mut pic = pair();
    pic.write(0, 1, 0x08);
    pulse(&mut pic, 3);
    assert!(!pic.output());
    pic.write(0, 1, 0x00);
    assert!(pic.output());
    assert_eq!(pic.acknowledge(), 0x23);
}

#[test]
fn edge_requests_once_level_until_it_falls() {
    let mut pic = pair();
    pic.write_elcr(0, 0x20);
    pic.set_irq(4, true);
    assert_eq!(pic.acknowledge(), 0x24);
    pic.write(0, 0, 0x20);
    assert!(!pic.output(), "a held edge does not ask again");
    pic.set_irq(5, true);
    for _ in 0..3 {
        assert_eq!(pic.acknowledge(), 0x25);
        pic.write(0, 0, 0x20);
        assert!(pic.output());
    }
    pic.set_irq(5, false);
    assert!(!pic.output());
}

#[test]
fn edge_level_control_keeps_fixed_edges() {
    let mut pic = pair();
    pic.write_elcr(0, 0xff);
    pic.write_elcr(1, 0xff);
    assert_eq!((pic.read_elcr(0), pic.read_elcr(1)), (0xf8, 0xde));
}

#[test]
fn slave_reaches_the_cpu_through_the_cascade() {
    let mut pic = pair();
    pulse(&mut pic, 12);
    assert!(pic.output());
    assert_eq!(pic.acknowledge(), 0x2c);
    assert_eq!((isr(&mut pic, 0), isr(&mut pic, 1)), (0x04, 0x10));
    pulse(&mut pic, 8);
    assert!(!pic.output(), "the master has the cascade in service");
    pic.write(1, 0, 0x20);
    assert_eq!(isr(&mut pic, 1), 0);
    assert!(!pic.output());
    pic.write(0, 0, 0x20);
    assert!(pic.output());
    assert_eq!(pic.acknowledge(), 0x28);
    pulse(&mut pic, 1);
    assert_eq!(pic.acknowledge(), 0x21);
}

#[test]
fn special_fully_nested_master_lets_a_higher_slave_request_through() {
    let mut pic = pair_with_icw4(0x11);
    pulse(&mut pic, 12);
    assert_eq!(pic.acknowledge(), 0x2c);
    pulse(&mut pic, 14);
    assert!(!pic.output());
    pulse(&mut pic, 8);
    assert!(pic.output());
    assert_eq!(pic.acknowledge(), 0x28);
}

#[test]
fn acknowledge_without_request_gives_spurious_7_not_in_service() {
    let mut pic = pair();
    pic.write_elcr(0, 0x20);
    pic.set_irq(5, true);
    pic.set_irq(5, false);
    assert_eq!(pic.acknowledge(), 0x27);
    assert_eq!(isr(&mut pic, 0), 0);
}

#[test]
fn slave_request_withdrawn_gives_spurious_15_with_cascade_in_service() {
    let mut pic = pair();
    pic.write_elcr(1, 0x08);
    pic.set_irq(11, true);
    pic.set_irq(11, false);
    assert_eq!(pic.acknowledge(), 0x2f);
    assert_eq!((isr(&mut pic, 0), isr(&mut pic, 1)), (0x04, 0));
}

#[test]
fn automatic_end_of_interrupt_leaves_nothing_in_service() {
    let mut pic = pair_with_icw4(0x03);
    pulse(&mut pic, 3);
    pulse(&mut pic, 4);
    assert_eq!(pic.acknowledge(), 0x23);
    assert_eq!(isr(&mut pic, 0), 0);
    assert_eq!(pic.acknowledge(), 0x24);
    assert!(!pic.output());
}

#[test]
fn rotation_on_automatic_end_makes_the_served_lowest() {
    let mut pic = pair_with_icw4(0x03);
    pic.write(0, 0, 0x80);
    pulse(&mut pic, 3);
    assert_eq!(pic.acknowledge(), 0x23);
    pulse(&mut pic, 3);
    pulse(&mut pic, 6);
    assert_eq!(pic.acknowledge(), 0x26);
    pic.write(0, 0, 0x00);
    pulse(&mut pic, 0);
    assert_eq!(pic.acknowledge(), 0x20, "7, 0, 1, 2, 3 is the order now");
    assert_eq!(pic.acknowledge(), 0x23);
}

#[test]
fn rotation_on_end_of_interrupt_and_by_command() {
    let mut pic = pair();
    pulse(&mut pic, 4);
    assert_eq!(pic.acknowledge(), 0x24);
    pic.write(0, 0, 0xa0);
    pulse(&mut pic, 4);
    pulse(&mut pic, 5);
    assert_eq!(pic.acknowledge(), 0x25, "after rotation 5 is the highest");
    pic.write(0, 0, 0xe5);
    pulse(&mut pic, 6);
    assert_eq!(pic.acknowledge(), 0x26);
    pic.write(0, 0, 0x66);
    pic.write(0, 0, 0xc7);
    pulse(&mut pic, 0);
    assert_eq!(pic.acknowledge(), 0x20, "set priority: 7 the lowest, 0 the highest");
}

#[test]
fn special_mask_mode_lets_lower_requests_through() {
    let mut pic = pair();
    pulse(&mut pic, 1);
    assert_eq!(pic.acknowledge(), 0x21);
    pulse(&mut pic, 5);
    assert!(!pic.output());
    pic.write(0, 1, 0x02);
    assert!(!pic.output());
    pic.write(0, 0, 0x68);
    assert!(pic.output());
    assert_eq!(pic.acknowledge(), 0x25);
    pic.write(0, 0, 0x20);
    assert_eq!(isr(&mut pic, 0), 0x02, "the masked input is not ended by the non-specific command");
    pic.write(0, 0, 0x48);
    pulse(&mut pic, 6);
    assert!(!pic.output());
}

#[test]
fn poll_acknowledges_and_tells_the_input() {
    let mut pic = pair();
    pic.write(0, 0, 0x0c);
    assert_eq!(pic.read(0, 0), 0x00);
    pulse(&mut pic, 9);
    pic.write(0, 0, 0x0c);
    assert_eq!(pic.read(0, 0), 0x82);
    pic.write(1, 0, 0x0c);
    assert_eq!(pic.read(1, 0), 0x81);
    assert_eq!((isr(&mut pic, 0), isr(&mut pic, 1)), (0x04, 0x02));
    assert!(!pic.output());
    pic.write(1, 0, 0x20);
    pic.write(0, 0, 0x20);
    assert!(!pic.output());
}

#[test]
fn saved_state_continues_the_same() {
    let mut pic = pair();
    pic.write_elcr(1, 0x08);
    pic.set_irq(11, true);
    pulse(&mut pic, 3);
    assert_eq!(pic.acknowledge(), 0x2b);
    let mut copy = PicPair::new();
    copy.load(&pic.state());
    assert_eq!(copy.state(), pic.state());
    for pair in [&mut pic, &mut copy] {
        assert!(!pair.output());
        pair.write(1, 0, 0x20);
        pair.write(0, 0, 0x20);
        assert_eq!(pair.acknowledge(), 0x2b);
    }
}
