use afterimage_blockdev::{AgentId, Epoch, HistoryId, MachineId, SystemClock};
use afterimage_cache::MarkKind;

use super::*;

fn identity(epoch: u64) -> FrameIdentity {
    FrameIdentity {
        machine: MachineId([1; 16]),
        history: HistoryId([2; 16]),
        origin: AgentId([3; 16]),
        epoch: Epoch(epoch),
    }
}

fn order(reserved: u64) -> Arc<Order> {
    let start = OrderStart {
        identity: identity(1),
        next: Lsn(1),
        reserved: Lsn(reserved),
        time_floor: Timestamp(u64::MAX / 2),
    };
    let clock = Arc::new(ApplianceClock::new(Arc::new(SystemClock::default()), 0));
    let options = PortionOptions {
        bytes: 10_000,
        gather: Duration::ZERO,
    };
    Arc::new(Order::new(start, clock, options, 100, Box::new(|| ())))
}

fn mark() -> Draft {
    Draft::note(RecordKind::Mark(MarkKind::Crash), BatchId(0), 0, Vec::new())
}

fn epoch_start() -> Draft {
    Draft::note(RecordKind::EpochStart, BatchId(0), 0, Vec::new())
}

fn write(disk: DiskId, place: DiskPlace, len: usize) -> Draft {
    Draft {
        kind: RecordKind::Write,
        disk: Some((disk, place)),
        offset: 0,
        length: len as u64,
        batch: BatchId(0),
        argument: 0,
        payload: Payload::Data(BlockBytes::Copied(vec![0; len])),
    }
}

#[test]
fn nothing_gets_an_lsn_while_nothing_flows() {
    let order = order(1000);
    let mut dropped = false;
    assert_eq!(order.append([mark()], || dropped = true), None);
    assert!(dropped);
    assert_eq!(order.begin_flow([epoch_start(), mark()]), Some(Lsn(2)));
    assert_eq!(order.append([mark()], || ()), Some(Lsn(3)));
    assert!(order.stop_flow());
    assert_eq!(order.append([mark()], || ()), None);
    assert_eq!(order.captured().0, Lsn(3));
}

#[test]
fn no_lsn_beyond_the_reservation_is_given_out() {
    let order = order(DRAFTS_MAX + 10);
    order.begin_flow([]);
    let given = (0..100)
        .filter_map(|_| order.append([mark()], || ()))
        .count();
    assert_eq!(given, 10);
    assert!(!order.is_flowing());
    order.reserve(Lsn(2000));
    order.begin_flow([]);
    assert_eq!(order.append([mark()], || ()), Some(Lsn(11)));
}

#[test]
fn an_epoch_starts_a_portion_and_each_disk_has_its_chain() {
    let order = order(100_000);
    let (a, b) = (order.add_disk(), order.add_disk());
    let (one, two) = (DiskId([1; 16]), DiskId([2; 16]));
    order.begin_flow([mark(), epoch_start()]);
    for _ in 0..2 {
        order.append([write(one, a, 4096), write(two, b, 4096)], || ());
    }
    order.close();
    let portions: Vec<Portion> = std::iter::from_fn(|| order.take()).collect();
    let kinds: Vec<Vec<RecordKind>> = portions
        .iter()
        .map(|portion| {
            portion
                .records
                .iter()
                .map(|record| record.header.kind)
                .collect()
        })
        .collect();
    assert_eq!(kinds[0], [RecordKind::Mark(MarkKind::Crash)]);
    assert_eq!(kinds[1][0], RecordKind::EpochStart);
    let headers: Vec<RecordHeader> = portions
        .iter()
        .flat_map(|p| p.records.iter().map(|record| record.header))
        .collect();
    let chain: Vec<(u64, u64)> = headers[2..]
        .iter()
        .map(|header| (header.lsn.0, header.previous.0))
        .collect();
    assert_eq!(chain, [(3, 0), (4, 0), (5, 3), (6, 4)]);
    assert!(
        headers
            .iter()
            .all(|header| header.time == Timestamp(u64::MAX / 2)),
        "never falls"
    );
    let tickets: Vec<u64> = portions.iter().map(|portion| portion.ticket).collect();
    assert_eq!(tickets, (0..portions.len() as u64).collect::<Vec<_>>());
}

#[test]
fn a_restart_drops_the_queue_and_goes_on_above() {
    let order = order(100_000);
    let place = order.add_disk();
    order.begin_flow([epoch_start()]);
    order.append([write(DiskId([1; 16]), place, 4096)], || ());
    let dropped = order.restart(identity(2), Lsn(50));
    assert_eq!(dropped, 4096 + RECORD_OVERHEAD);
    assert!(!order.is_flowing());
    assert_eq!(order.begin_flow([epoch_start()]), Some(Lsn(50)));
    let portion = order.take().unwrap();
    assert_eq!(portion.identity.epoch, Epoch(2));
    assert_eq!(portion.records.len(), 1);
}

#[test]
fn the_oldest_unacknowledged_time_is_known() {
    let order = order(100_000);
    order.begin_flow([mark(), mark(), mark()]);
    assert!(order.acknowledged(Lsn(1)).is_some());
    assert!(order.acknowledged(Lsn(3)).is_none());
    order.append([mark()], || ());
    assert!(order.acknowledged(Lsn(3)).is_some());
}

/// Several takers see each record once, and tickets tell the order.
#[test]
fn portions_of_several_takers_go_together_again() {
    let order = order(u64::MAX);
    let place = order.add_disk();
    order.begin_flow([]);
    let takers: Vec<_> = (0..3)
        .map(|_| {
            let order = Arc::clone(&order);
            std::thread::spawn(move || {
                std::iter::from_fn(|| order.take()).collect::<Vec<Portion>>()
            })
        })
        .collect();
    for _ in 0..2000 {
        order.append([write(DiskId([1; 16]), place, 4096)], || ());
    }
    order.close();
    let mut portions: Vec<Portion> = takers
        .into_iter()
        .flat_map(|taker| taker.join().unwrap())
        .collect();
    portions.sort_by_key(|portion| portion.ticket);
    let lsns: Vec<u64> = portions
        .iter()
        .flat_map(|p| p.records.iter().map(|record| record.header.lsn.0))
        .collect();
    assert_eq!(lsns, (1..=2000).collect::<Vec<_>>());
}
