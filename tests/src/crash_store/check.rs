//! The comparison of a recovered store with the model.

use std::collections::{BTreeMap, BTreeSet};

use afterimage_blockdev::{DiskId, HistoryId, Lsn, PointId, StoreId};
use afterimage_seed::engine::{DeclaredDisk, EngineInfo, StoreFile};
use afterimage_seed::segment::{SECTOR, SeedFooter, seed_file};
use afterimage_seed::{Request, Response, SeedError};

use super::retain::is_of_window;
use super::{Campaign, fork_of};
use crate::store_model::content;
use crate::store_rig::StoreRig;

/// LSNs looked at for each disk, besides the newest one and the points.
const SAMPLES: u64 = 3;

/// Segments of bulk blocks have this bit in their number.
const SEED_BIT: u32 = 1 << 31;

type BulkKey = (HistoryId, DiskId, u64, u8, Lsn);

impl Campaign {
    /// Compares everything that a recovered store shows.
    pub(super) fn check(&mut self, rig: &mut StoreRig) {
        let info = match rig.ask(Request::Info) {
            Some(Ok(Response::Info(info))) => info,
            other => panic!("seed {}: {other:?} for the state", self.seed),
        };
        // A header that was torn by an earlier crash and not written again; what follows it counts.
        let is_torn = |text: &String| text.contains("log segment header");
        let damage: Vec<_> = info.damage.iter().filter(|text| !is_torn(text)).collect();
        assert!(
            damage.is_empty(),
            "seed {}: damage: {:?}",
            self.seed,
            info.damage
        );
        self.check_histories(&info);
        self.check_floors(&info);
        self.check_bulk(rig);
        self.check_points(rig);
        self.check_images(rig);
        self.check_changes(rig);
    }

    fn check_histories(&mut self, info: &EngineInfo) {
        let seed = self.seed;
        let found = |history: HistoryId| {
            info.machines
                .iter()
                .flat_map(|m| &m.histories)
                .find(|h| h.history == history)
        };
        let histories: Vec<_> = self.known.model.histories.keys().copied().collect();
        for id in histories {
            let history = self.known.model.histories.get_mut(&id).expect("listed");
            let Some(found) = found(id) else {
                let is_allowed = history.is_dropping || !self.known.opened.contains(&id);
                assert!(is_allowed, "seed {seed}: history {id} is gone");
                history.truncate(fork_of(history.parent));
                history.bulk.clear();
                if history.is_branch {
                    self.known.model.histories.remove(&id);
                    self.known.branches.remove(&id);
                    self.known.opened.retain(|known| *known != id);
                }
                continue;
            };
            let durable = found.durable;
            history.is_dropping = false;
            if history.is_branch {
                history.durable = durable;
                let run = self.known.branches.get_mut(&id).expect("a known branch");
                if run.recovered(durable, seed) > 0 {
                    self.report.count("branch-tail-dropped");
                }
                continue;
            }
            let (promised, fork) = (history.acknowledged, fork_of(history.parent));
            assert!(
                durable >= promised,
                "seed {seed}: {durable} of {id} durable, not {promised}"
            );
            let is_end = durable == fork || history.frames.contains(&durable);
            assert!(
                is_end,
                "seed {seed}: {durable} of {id} ends no frame: {:?}",
                history.frames
            );
            if durable > promised {
                self.report.count("unacknowledged-kept");
            }
            if history.frames.last().is_some_and(|last| *last > durable) {
                self.report.count("tail-dropped");
            }
            history.truncate(durable);
        }
    }

    fn check_bulk(&mut self, rig: &mut StoreRig) {
        let seed = self.seed;
        let files = match rig.ask(Request::Files) {
            Some(Ok(Response::Files(files))) => files,
            other => panic!("seed {seed}: {other:?} for files"),
        };
        if files.iter().any(|file| matches!(file, StoreFile::Run(_))) {
            self.report.count("run-read-at-start");
        }
        let present = present_bulk(rig, &files, seed);
        for (id, history) in &mut self.known.model.histories {
            let report = &mut self.report;
            history.bulk.retain_mut(|bulk| {
                let length = bulk.stamps.len() as u64 * 4096;
                let cells = afterimage_cache::record::cells(bulk.first as u64 * 4096, length);
                let keys = cells.map(|(cell, mask)| (*id, bulk.disk, cell.0, mask, bulk.lsn));
                let count = keys.clone().count();
                let kept = keys.filter(|key| present.contains(key)).count();
                // What was known to be there may have been collected since; the images tell.
                if bulk.is_acknowledged {
                    return true;
                }
                assert!(
                    kept == count || kept == 0,
                    "seed {seed}: {kept} of {count} slots of bulk frame {} are there",
                    bulk.number
                );
                match (kept > 0, bulk.is_acknowledged) {
                    (true, false) => report.count("unacknowledged-bulk-kept"),
                    (false, _) => report.count("bulk-dropped"),
                    _ => {}
                }
                bulk.is_acknowledged = true;
                kept > 0
            });
        }
    }

    fn check_points(&mut self, rig: &mut StoreRig) {
        let seed = self.seed;
        let mut everything = BTreeMap::new();
        let known: BTreeSet<_> = self
            .writers
            .iter()
            .map(|w| (w.machine, w.name.clone()))
            .collect();
        for (machine, name) in known {
            let request = Request::ListPoints {
                machine: name,
                after: PointId(0),
                limit: 100_000,
            };
            let found = match rig.ask(request) {
                Some(Ok(Response::Points(found, total))) => {
                    assert_eq!(found.len() as u64, total, "seed {seed}");
                    found
                }
                // The machine was never acknowledged.
                Some(Err(SeedError::Refused { .. })) => Vec::new(),
                other => panic!("seed {seed}: {other:?} for points"),
            };
            for record in &found {
                let key = (machine, record.name.clone());
                everything.insert(key.clone(), record.locked_until);
                let Some(point) = self.known.points.get_mut(&key) else {
                    panic!("seed {seed}: point {} should not be there", record.name);
                };
                assert_eq!(
                    (record.history, record.lsn),
                    (point.history, point.lsn),
                    "seed {seed}"
                );
                if !point.is_acknowledged || point.is_dropping {
                    self.report.count("point-undecided");
                }
                point.is_acknowledged = true;
                point.is_dropping = false;
            }
            let is_found = |name: &String| found.iter().any(|record| record.name == *name);
            self.known.points.retain(|(of, name), point| {
                // Its mark may still come, from an agent that lived on.
                let is_late = self.writers.iter().any(|writer| {
                    let kept = writer.kept.iter().any(|kept| {
                        (kept.frame.header.first..=kept.frame.header.last).contains(&point.lsn)
                    });
                    writer.history == point.history && kept
                });
                let is_gone = *of == machine && !is_found(name) && !is_late;
                let is_thinning = self.known.kept.thinning.contains(&(*of, name.clone()));
                let is_kept = point.is_acknowledged && !point.is_dropping && !is_thinning;
                let is_lost = is_gone && is_kept;
                assert!(!is_lost, "seed {seed}: point {name} is gone");
                !is_gone
            });
        }
        self.check_retention(rig, &everything);
    }

    fn check_images(&mut self, rig: &mut StoreRig) {
        let histories: Vec<_> = self.known.model.histories.keys().copied().collect();
        for history in histories {
            if self.known.branches.contains_key(&history) {
                self.check_branch(rig, history);
                continue;
            }
            let Some(machine) = self.machine_of(history) else {
                continue;
            };
            let durable = self.known.model.histories[&history].durable;
            if !self.known.opened.contains(&history) && durable == Lsn::ZERO {
                continue;
            }
            let mut lsns = BTreeSet::from([durable]);
            for _ in 0..SAMPLES {
                lsns.insert(Lsn(self.random.below(durable.0 + 1)));
            }
            let points = self.known.points.values();
            let points = points.filter(|p| p.history == history && p.lsn <= durable);
            lsns.extend(points.map(|point| point.lsn).take(4));
            let disks: Vec<_> = self.writers[machine]
                .disks
                .iter()
                .map(|disk| disk.id)
                .filter(|disk| self.known.declared.contains(disk))
                .collect();
            if disks.is_empty() {
                continue;
            }
            for lsn in lsns {
                let disk = disks[self.random.index(disks.len())];
                self.check_image(rig, machine, history, disk, lsn, false);
            }
            let disk = disks[self.random.index(disks.len())];
            let lsn = Lsn(self.random.below(durable.0 + 1));
            self.check_image(rig, machine, history, disk, lsn, true);
            let disk = disks[self.random.index(disks.len())];
            self.check_image(rig, machine, history, disk, durable, true);
        }
    }

    pub(super) fn machine_of(&self, history: HistoryId) -> Option<usize> {
        let mut roots: Vec<(usize, HistoryId)> = self
            .writers
            .iter()
            .enumerate()
            .map(|(place, w)| (place, w.history))
            .collect();
        loop {
            if let Some((place, _)) = roots.iter().find(|(_, root)| *root == history) {
                return Some(*place);
            }
            let model = &self.known.model;
            let up = |(place, root): &(usize, HistoryId)| {
                let parent = model.histories.get(root)?.parent?;
                Some((*place, parent.0))
            };
            roots = roots.iter().filter_map(up).collect();
            if roots.is_empty() {
                return None;
            }
        }
    }

    /// Looks at a state while the engine works.
    pub(super) fn look(&mut self, rig: &mut StoreRig, machine: usize) {
        let history = self.writers[machine].history;
        let durable = self.known.model.histories[&history].acknowledged;
        let disks = &self.writers[machine].disks;
        let disk = disks[self.random.index(disks.len())].id;
        let lsn = Lsn(self.random.below(durable.0 + 1));
        self.check_image(rig, machine, history, disk, lsn, false);
    }

    fn check_image(
        &mut self,
        rig: &mut StoreRig,
        machine: usize,
        history: HistoryId,
        disk: DiskId,
        asked: Lsn,
        allow_incomplete: bool,
    ) {
        let seed = self.seed;
        let name = self.writers[machine].name.clone();
        let reference = format!("{name}/{disk}@{history}:lsn:{asked}");
        let Some(answer) = rig.snapshot(&reference, allow_incomplete) else {
            return;
        };
        // What the engine said meanwhile decides which batches are whole, and which bulk is there.
        self.hear(rig);
        let model = &self.known.model;
        let shown = if allow_incomplete {
            asked
        } else {
            model.shown(history, disk, asked)
        };
        let is_whole = allow_incomplete || model.is_copied(history, disk, shown);
        let taken = match answer {
            Ok(taken) => taken,
            Err(SeedError::Incomplete { .. }) if !is_whole => {
                self.report.count("incomplete-refused");
                return;
            }
            Err(SeedError::Refused { .. }) if !self.known.opened.contains(&history) => return,
            Err(error) if is_of_window(&error) => {
                let is_below = self.is_below_window(rig, history, asked)
                    || self.is_below_window(rig, history, shown);
                assert!(is_below, "seed {seed}: {reference}: {error}");
                return;
            }
            Err(error) => panic!("seed {seed}: {reference}: {error}"),
        };
        assert!(
            is_whole,
            "seed {seed}: {reference} shows {shown}, which is not whole"
        );
        assert_eq!(taken.snapshot.lsn, shown, "seed {seed}: {reference}");
        if shown < asked {
            self.report.count("shown-before-batch");
        }
        if model.image(history, disk, shown).len() > model.sizes[&disk] {
            self.report.count("disk-grown");
        }
        if taken.snapshot.layers.len() > 1 {
            self.report.count("several-layers");
        }
        let expected = model.image(history, disk, shown);
        let view = rig.view(&taken);
        let Some(found) = rig.read(&*view, 0, expected.len() * 4096) else {
            return;
        };
        assert_eq!(
            view.geometry().size_bytes,
            expected.len() as u64 * 4096,
            "seed {seed}"
        );
        if self.is_faulty && found.is_err() {
            return;
        }
        let found = found.unwrap_or_else(|error| panic!("seed {seed}: {reference}: {error}"));
        self.report.count("image-compared");
        for (block, stamp) in expected.iter().enumerate() {
            assert!(
                found[block * 4096..(block + 1) * 4096] == content(&[*stamp]),
                "seed {seed}: {reference} block {block} differs (shown at {shown}, expected stamp \
                 {stamp:#x}, found {:02x?})",
                &found[block * 4096..block * 4096 + 8]
            );
        }
    }

    fn check_branch(&mut self, rig: &mut StoreRig, history: HistoryId) {
        let seed = self.seed;
        let run = self.known.branches[&history].clone();
        let durable = self.known.model.histories[&history].durable;
        let middle = Lsn(run.fork.0 + self.random.below(durable.0 - run.fork.0 + 1));
        let name = self.name_of(run.machine).to_owned();
        for lsn in BTreeSet::from([durable, middle]) {
            let reference = format!("{name}/{}@{history}:lsn:{lsn}", run.disk);
            let Some(answer) = rig.snapshot(&reference, false) else {
                return;
            };
            let taken = match answer {
                Ok(taken) => taken,
                Err(error) => {
                    let is_below = is_of_window(&error) && self.is_below_window(rig, history, lsn);
                    assert!(is_below, "seed {seed}: {reference}: {error}");
                    continue;
                }
            };
            assert_eq!(taken.snapshot.lsn, lsn, "seed {seed}: {reference}");
            let expected = run.image(lsn);
            let view = rig.view(&taken);
            let Some(found) = rig.read(&*view, 0, expected.len()) else {
                return;
            };
            let found = found.unwrap_or_else(|error| panic!("seed {seed}: {reference}: {error}"));
            let place = found
                .iter()
                .zip(&expected)
                .position(|(found, right)| found != right);
            assert!(
                place.is_none(),
                "seed {seed}: {reference} differs at {place:?}"
            );
        }
    }

    /// What the store says is done of a first copy must be there.
    pub(super) fn check_declared(&mut self, machine: usize, disk: usize, declared: &DeclaredDisk) {
        let writer = &self.writers[machine];
        let (history, id) = (writer.history, writer.disks[disk].id);
        let model = &self.known.model.histories[&history];
        for (first, count) in &declared.bulk_done {
            for block in *first..first + count {
                let is_there = model.bulk.iter().any(|bulk| {
                    let blocks = bulk.first as u64..(bulk.first + bulk.stamps.len()) as u64;
                    bulk.disk == id && blocks.contains(&block)
                });
                assert!(
                    is_there,
                    "seed {}: block {block} was never copied",
                    self.seed
                );
            }
        }
        let is_copied = self
            .known
            .model
            .is_copied(history, id, Lsn(u64::MAX).min(model.durable));
        assert_eq!(declared.has_copy, is_copied, "seed {}", self.seed);
        if declared.is_in_batch {
            self.report.count("batch-unfinished");
        }
    }
}

/// The bulk slots that the store's seed segments hold.
fn present_bulk(rig: &StoreRig, files: &[StoreFile], seed: u64) -> BTreeSet<BulkKey> {
    let store: StoreId = rig.engine.store();
    let mut present = BTreeSet::new();
    for file in files {
        let StoreFile::Seed(segment, generation) = *file else {
            continue;
        };
        // A destaged segment holds writes, and one of them may be about the same blocks at the
        // LSN that a bulk block names.
        if segment.0 & SEED_BIT == 0 {
            continue;
        }
        let bytes = rig
            .storage
            .read_live(&seed_file(segment, generation))
            .expect("a named segment is there");
        let footer = SeedFooter::find(&bytes[bytes.len() - 2 * SECTOR..], store, segment);
        let footer = footer.unwrap_or_else(|damage| panic!("seed {seed}: {damage}"));
        let at = usize::try_from(footer.directory_offset).expect("a small file");
        let (_, entries) = footer
            .decode_directory(&bytes[at..])
            .expect("a whole directory");
        for entry in entries {
            let context = entry.context;
            let (cell, mask) = (context.cell.0, context.mask);
            present.insert((context.history, context.disk, cell, mask, context.lsns[0]));
        }
    }
    present
}
