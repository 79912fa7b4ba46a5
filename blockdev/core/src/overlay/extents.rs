//! What is known of an overlay's ranges: each side is asked, and each block believes its own.

use core::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;

use super::join::Join;
use super::{BLOCK, Caller, Shared};
use crate::device::{
    BlockCompleter, BlockCompletion, BlockDevice, BlockErrorKind, BlockOp, BlockOutcome, Extent,
    ExtentKind,
};
use crate::id::Token;

type Answer = Arc<Mutex<Vec<Extent>>>;

/// Takes one side's answer.
struct Side {
    answer: Answer,
    join: Arc<Join>,
    asked: Range<u64>,
}

impl BlockCompleter for Side {
    fn complete(&self, completion: BlockCompletion) {
        let all = Extent {
            offset: self.asked.start,
            length: self.asked.end - self.asked.start,
            kind: ExtentKind::Data,
        };
        let result = match completion.result.map_err(|error| error.kind) {
            Ok(BlockOutcome::Extents(extents)) => Ok(extents),
            // A side that does not know may hold data everywhere.
            Ok(_) | Err(BlockErrorKind::NotSupported) => Ok(vec![all]),
            Err(kind) => Err(kind),
        };
        let result = result.map(|extents| *self.answer.lock() = extents);
        self.join.finish(result);
    }
}

impl Shared {
    /// Asks both sides about a range.
    pub(super) fn extents(self: &Arc<Self>, offset: u64, length: u64, caller: Caller) {
        let asked = offset..offset + length;
        let answers = [Answer::default(), Answer::default()];
        let shared = Arc::clone(self);
        let join = Join::new(2, {
            let (answers, asked) = (answers.clone(), asked.clone());
            Box::new(move |result| {
                let merged = result.map(|()| {
                    let [base, over] = answers.map(|answer| core::mem::take(&mut *answer.lock()));
                    BlockOutcome::Extents(shared.merge(asked, &base, &over))
                });
                caller.reply(merged);
            })
        });
        let unit = self.over_unit;
        let wide = asked.start - asked.start % unit..asked.end.next_multiple_of(unit);
        let [base, over] = answers;
        ask(&*self.base, asked, base, &join);
        ask(&*self.over, wide, over, &join);
    }

    fn merge(&self, asked: Range<u64>, base: &[Extent], over: &[Extent]) -> Vec<Extent> {
        let mut merged: Vec<Extent> = Vec::new();
        // One position for each side: both answers and the runs are in order.
        let mut sides = [base.iter().peekable(), over.iter().peekable()];
        for (is_present, blocks) in self.present.runs(Self::blocks(asked.start, asked.end)) {
            let end = (blocks.end * BLOCK).min(asked.end);
            let mut at = (blocks.start * BLOCK).max(asked.start);
            let side = &mut sides[usize::from(is_present)];
            while at < end {
                while side
                    .next_if(|extent| extent.offset + extent.length <= at)
                    .is_some()
                {}
                let (until, kind) = match side.peek() {
                    Some(extent) if extent.offset <= at => {
                        ((extent.offset + extent.length).min(end), extent.kind)
                    }
                    _ => (end, ExtentKind::Data),
                };
                match merged.last_mut() {
                    Some(last) if last.kind == kind => last.length += until - at,
                    _ => merged.push(Extent {
                        offset: at,
                        length: until - at,
                        kind,
                    }),
                }
                at = until;
            }
        }
        merged
    }
}

fn ask(side: &dyn BlockDevice, asked: Range<u64>, answer: Answer, join: &Arc<Join>) {
    let op = BlockOp::Extents {
        offset: asked.start,
        length: asked.end - asked.start,
    };
    let to = Arc::new(Side {
        answer,
        join: Arc::clone(join),
        asked,
    });
    side.submit(Token(0), op, to);
}
