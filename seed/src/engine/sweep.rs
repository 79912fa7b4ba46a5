//! Collecting what nobody needs: bring the map up to date, sweep it, then destage log segments and
//! rewrite or drop seed segments by what the sweep found.
//!
//! Invariants
//! * Only durable floors count, and they only rise; so what a sweep found dead stays dead.
//! * A segment is judged only if all that names it is in the runs that were swept.
//! * Log segments go in order, from the oldest on.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use afterimage_blockdev::SegmentId;
use afterimage_cache::log::LogInput;

use super::live::{LiveMap, LiveSlots};
use super::rewrite::Source;
use super::{Collected, Engine, Event, Output, Phase, RequestId, Response};
use crate::reader::SEED_BIT;

/// The wait between collections that nobody can help doubles so often.
const IDLE_DOUBLINGS: u32 = 6;

#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
enum Step {
    #[default]
    Idle,
    /// What gives way must be durable first.
    Yield,
    Flush,
    Merge,
    Segments,
}

/// A segment to be dealt with.
#[derive(Debug)]
pub(super) struct Judged {
    pub(super) segment: SegmentId,
    pub(super) source: Source,
    pub(super) live: LiveSlots,
}

/// A collection on its way.
#[derive(Debug, Default)]
pub(super) struct Sweep {
    step: Step,
    /// The map must reach to this sequence of the log.
    sequence: u64,
    pub(super) logs: VecDeque<Judged>,
    pub(super) seeds: VecDeque<Judged>,
    pub(super) done: Collected,
    requests: Vec<RequestId>,
    /// Asked for while one was on its way.
    next_requests: Vec<RequestId>,
    /// Somebody waits for room.
    is_needed: bool,
    /// The log is longer than its cache.
    is_log_long: bool,
    /// The medium is full: nothing but what gives room.
    is_pressed: bool,
}

impl Sweep {
    /// Requests for a collection that was not begun.
    pub(super) fn take_requests(&mut self) -> Vec<RequestId> {
        core::mem::take(&mut self.next_requests)
    }
}

impl Engine {
    /// Somebody waits for room.
    pub(super) fn lacks_room(&self) -> bool {
        self.is_paused.is_some() || self.bulk.waits_for_room()
    }

    /// Says whether the file system of the segments had room when it was last asked: the log may
    /// be full on one of its own.
    fn has_segment_room(&self) -> bool {
        let needed = self.options.reserve_bytes + 2 * self.options.segment_bytes;
        self.space.has_free(needed)
    }

    /// Something may have become collectable: the next collection that is needed need not wait.
    pub(super) fn hope_for_room(&mut self) {
        self.sweep_retry_at = None;
        self.idle_sweeps = 0;
    }

    /// Collects now; answered when it is done.
    pub(super) fn collect(&mut self, id: RequestId) {
        self.sweep.next_requests.push(id);
    }

    /// Begins a collection by the clock, on request, or when there is no room.
    pub(super) fn sweep_when_due(&mut self, out: &mut Vec<Output>) {
        self.look_for_shortage();
        if self.sweep.step != Step::Idle {
            return self.sweep_on(out);
        }
        if self.refuses_to_collect(out) {
            return;
        }
        let is_retry = self.sweep_retry_at.is_none_or(|at| at <= self.now);
        let lacks_room = self.lacks_room();
        let is_needed = is_retry && (lacks_room || self.is_budget_short());
        // Where only the budget ends, there is room to work with.
        let is_pressed =
            is_needed && lacks_room && self.is_paused != Some(true) && !self.has_segment_room();
        let is_asked = !self.sweep.next_requests.is_empty();
        let is_log_long = is_retry && self.is_log_long();
        let is_wanted = is_asked || is_log_long || self.quotas_want_sweep();
        if self.now < self.next_sweep && !is_needed && !is_wanted {
            out.push(Output::WakeAt(self.next_sweep));
            return;
        }
        self.next_sweep = self.now.after(self.options.collect_interval);
        if is_needed && self.vain_sweeps > 0 {
            let has_given = self.give_way(lacks_room, out);
            self.idle_sweeps = if has_given { 0 } else { self.idle_sweeps + 1 };
        } else if is_needed {
            self.move_windows(out);
        } else if !lacks_room {
            self.recover_windows();
        }
        self.keep_quotas(out);
        self.sweep = Sweep {
            step: Step::Yield,
            is_needed,
            is_log_long,
            sequence: self.applied_sequence,
            requests: core::mem::take(&mut self.sweep.next_requests),
            is_pressed,
            ..Sweep::default()
        };
        self.sweep_on(out);
    }

    fn sweep_on(&mut self, out: &mut Vec<Output>) {
        if self.sweep.step == Step::Yield && !self.manifest.is_busy() {
            self.sweep.step = Step::Flush;
        }
        match self.sweep.step {
            Step::Flush => {
                if self.checkpoint < self.sweep.sequence {
                    // Without room the map cannot be written; what is in it already is swept.
                    if !self.sweep.is_pressed || self.flush_retry_at.is_none() {
                        return self.flush_when_due(true, out);
                    }
                }
                if self.flush.is_none() && self.merge.is_none() {
                    self.begin_sweep(out);
                }
            }
            Step::Segments => self.rewrite_next(out),
            Step::Idle | Step::Yield | Step::Merge => {}
        }
    }

    fn begin_sweep(&mut self, out: &mut Vec<Output>) {
        self.sweep.step = Step::Merge;
        let checkpoint = self.checkpoint;
        let logs = self.log.sealed_segments().into_iter();
        let logs = logs
            .take_while(|sealed| sealed.last_sequence <= checkpoint)
            .map(|sealed| sealed.segment);
        let base_through = self.base_through;
        let seeds = self.seed_segments.keys().copied();
        let seeds = seeds.filter(|id| id.0 & SEED_BIT == 0 || *id <= base_through);
        let account = self.begin_account();
        let live = LiveMap::new(checkpoint, logs.chain(seeds), account);
        self.ask_room(out);
        let runs: Vec<_> = self.runs.keys().copied().collect();
        let writes = !self.sweep.is_pressed && !runs.is_empty();
        self.begin_merge(runs, Some(live), writes, out);
    }

    pub(super) fn swept(&mut self, mut live: LiveMap, out: &mut Vec<Output>) {
        self.notes.judged(live.take_rest(), self.log_released);
        let account = live.take_account();
        self.end_account(account, &live);
        let mut live: BTreeMap<SegmentId, LiveSlots> = live.into_segments();
        for sealed in self.log.sealed_segments() {
            let Some(live) = live.remove(&sealed.segment) else {
                break;
            };
            let source = Source::Log {
                last_sequence: sealed.last_sequence,
                bytes: sealed.bytes,
            };
            let segment = sealed.segment;
            // One that is destaged already only waits to be removed.
            if !self.seed_segments.contains_key(&segment) {
                self.sweep.logs.push_back(Judged {
                    segment,
                    source,
                    live,
                });
            }
        }
        for (segment, live) in live {
            let Some(state) = self.seed_segments.get(&segment) else {
                continue;
            };
            let is_sparse = live.count() < state.slot_count / 2;
            let is_worth = live.count() == 0 || (is_sparse && !self.sweep.is_pressed);
            if is_worth {
                let source = Source::Seed(*state);
                self.sweep.seeds.push_back(Judged {
                    segment,
                    source,
                    live,
                });
            }
        }
        self.sweep.step = Step::Segments;
        self.sweep_on(out);
    }

    /// The next segment to be dealt with; none ends the collection.
    fn rewrite_next(&mut self, out: &mut Vec<Output>) {
        if self.rewrite.is_some() {
            return;
        }
        // What only gives room goes first.
        let is_dead = |judged: &Judged| judged.live.count() == 0;
        let dead = self.sweep.seeds.iter().position(is_dead);
        let mut next = dead.and_then(|place| self.sweep.seeds.remove(place));
        if next.is_none() {
            if !self.has_turn(out) {
                return;
            }
            let log = self.sweep.logs.pop_front();
            next = log.or_else(|| self.sweep.seeds.pop_front());
        }
        match next {
            Some(judged) => {
                self.spent_on_bytes(judged.source.bytes());
                self.begin_rewrite(judged, out);
            }
            None => self.end_sweep(out),
        }
    }

    /// Log segments behind one that must stay, stay as well.
    pub(super) fn stop_destaging(&mut self) {
        self.sweep.logs.clear();
    }

    pub(super) fn sweep_given_up(&mut self, out: &mut Vec<Output>) {
        self.end_sweep(out);
    }

    fn end_sweep(&mut self, out: &mut Vec<Output>) {
        let sweep = core::mem::take(&mut self.sweep);
        self.notes.sweep_ends();
        self.sweep.next_requests = sweep.next_requests;
        self.quotas_swept(out);
        if sweep.is_log_long && !sweep.is_needed {
            self.sweep_retry_at = Some(self.now.after(self.options.retry));
        }
        if sweep.is_needed {
            // When nobody can give anything, looking again soon is of no use.
            let wait = self.options.retry * (1 << self.idle_sweeps.min(IDLE_DOUBLINGS));
            let at = self.now.after(wait);
            self.sweep_retry_at = Some(at);
            out.push(Output::WakeAt(at));
            let gave_room = !self.lacks_room() && !self.is_budget_used();
            self.vain_sweeps = if gave_room { 0 } else { self.vain_sweeps + 1 };
        }
        out.push(Output::Event(Event::Collected(sweep.done)));
        for id in sweep.requests {
            out.push(Output::Reply(id, Ok(Response::Collected(sweep.done))));
        }
    }

    /// Ends a collection because the store is being closed; what is on its way is given up.
    pub(super) fn stop_collecting(&mut self, out: &mut Vec<Output>) {
        self.sweep.logs.clear();
        self.sweep.seeds.clear();
        self.give_rewrite_up_when_stopping(out);
        let is_over = self.rewrite.is_none() && self.merge.is_none();
        if is_over && self.phase == Phase::Stopping && self.sweep.step != Step::Idle {
            self.end_sweep(out);
        }
    }

    /// Keeps the files that are named now from being removed, until what is given back is dropped.
    #[must_use]
    pub fn pin_files(&mut self) -> Arc<()> {
        let pin = Arc::new(());
        self.pins.push(Arc::downgrade(&pin));
        pin
    }

    pub(super) fn are_files_pinned(&mut self) -> bool {
        self.pins.retain(|pin| pin.strong_count() > 0);
        !self.pins.is_empty()
    }

    /// Tells the log which of its segments the manifest no longer needs.
    pub(super) fn release_log(&mut self, out: &mut Vec<Output>) {
        if self.log_released > self.log_told {
            self.log_told = self.log_released;
            let through_sequence = self.log_released;
            self.log_step(LogInput::Release { through_sequence }, out);
        }
    }
}
