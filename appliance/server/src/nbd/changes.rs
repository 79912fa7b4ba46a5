//! `qemu:dirty-bitmap:<when>`: what changed since an earlier state of the same disk.

use std::sync::Arc;

use afterimage_nbd::export::MapDone;
use afterimage_nbd::number::state;
use afterimage_nbd::{Answer, Contexts, ExtentMap, MapExtent, Refusal};
use afterimage_protocol::rest::server::Point;
use afterimage_seed::ViewDevice;
use afterimage_seed::changed::Changes;

use super::exports::points_of;
use super::refuse::gone;
use crate::engine::{Command, EngineHandle, ViewOpened, ViewRequest};

/// Before the name of a context.
const PREFIX: &str = "qemu:dirty-bitmap:";

/// The states that an export can be compared with.
pub(super) struct SincePoints {
    engine: EngineHandle,
    /// `<machine>/<disk>`, as identities.
    place: String,
    machine: String,
    view: Arc<ViewDevice>,
    listed_max: usize,
}

impl SincePoints {
    /// Of a view; `None` when it cannot tell.
    pub(super) fn new(engine: EngineHandle, view: &ViewOpened, listed_max: usize) -> Option<Self> {
        Some(Self {
            engine,
            place: format!("{}/{}", view.machine, view.disk),
            machine: view.machine.to_string(),
            view: Arc::clone(view.view.as_ref()?),
            listed_max,
        })
    }

    /// Points of the machine that are not later than what is shown, in its own history.
    fn is_earlier(&self, point: &Point) -> bool {
        let snapshot = self.view.snapshot();
        let mut layers = snapshot.layers.iter();
        layers.any(|layer| layer.history == point.history && point.lsn <= layer.cap)
    }
}

impl Contexts for SincePoints {
    fn list<'a>(&'a self, prefix: &'a str) -> Answer<'a, Vec<String>> {
        Box::pin(async move {
            let is_open = prefix.is_empty() || prefix == "qemu:" || prefix == PREFIX;
            if !is_open && !prefix.starts_with(PREFIX) {
                return Ok(Vec::new());
            }
            if !is_open {
                let exists = self.open(prefix).await?.is_some();
                return Ok(exists.then(|| prefix.to_owned()).into_iter().collect());
            }
            let points = points_of(&self.engine, &self.machine, self.listed_max).await?;
            let earlier = points.iter().filter(|point| self.is_earlier(point));
            Ok(earlier
                .map(|point| format!("{PREFIX}{}", point.name))
                .collect())
        })
    }

    fn open<'a>(&'a self, name: &'a str) -> Answer<'a, Option<Arc<dyn ExtentMap>>> {
        Box::pin(async move {
            let Some(when) = name.strip_prefix(PREFIX).filter(|when| !when.is_empty()) else {
                return Ok(None);
            };
            let request = ViewRequest {
                reference: format!("{}@{when}", self.place),
                allow_incomplete: false,
            };
            let asked = self.engine.ask(|reply| Command::OpenView(request, reply));
            let Ok(opened) = asked.await.map_err(gone)? else {
                return Ok(None);
            };
            let Some(since) = opened.view else {
                return Ok(None);
            };
            let changes = Changes::between(&since, &self.view)
                .map_err(|error| Refusal::Unknown(error.to_string()))?;
            Ok(Some(Arc::new(ChangedMap(changes)) as Arc<dyn ExtentMap>))
        })
    }
}

struct ChangedMap(Changes);

impl ExtentMap for ChangedMap {
    fn extents(&self, offset: u64, length: u64, done: MapDone) {
        let to_extents = move |ranges: Result<Vec<afterimage_seed::changed::ChangedRange>, _>| {
            let extent = |range: &afterimage_seed::changed::ChangedRange| MapExtent {
                length: range.length,
                flags: if range.is_changed { state::DIRTY } else { 0 },
            };
            done(ranges.map(|ranges| ranges.iter().map(extent).collect()));
        };
        self.0.ranges(offset, length, Box::new(to_extents));
    }
}
