//! Waits for the first copy of a disk, and shows how far it is.

use afterimage_blockdev::ErrorClass;
use afterimage_protocol::message::DiskPhase;
use afterimage_protocol::rest::agent::{AgentStatus, TappedDisk};

use super::disk::phase;
use super::live_line::{LOOK_EVERY, LiveLine};
use crate::client::Client;
use crate::error::AftError;
use crate::output::{self, Output};

/// Waits until the disk is protected. An interruption ends only the waiting.
pub(super) async fn wait_for_copy(
    name: &str,
    agent: &Client,
    output: &Output,
) -> Result<TappedDisk, AftError> {
    let mut drawn = LiveLine::new(output);
    let result = tokio::select! {
        result = poll(name, agent, &mut drawn) => result,
        _ = tokio::signal::ctrl_c() => Err(AftError::new(
            ErrorClass::Retry,
            "interrupted; the copy goes on without being watched",
            "`aft agent status` shows how far it is",
        )),
    };
    drawn.end();
    result
}

async fn poll(name: &str, agent: &Client, drawn: &mut LiveLine) -> Result<TappedDisk, AftError> {
    loop {
        let status: AgentStatus = agent.get("/v1/status").await?;
        let disk = status
            .disks
            .into_iter()
            .find(|disk| disk.name == name)
            .ok_or_else(|| {
                AftError::new(
                    ErrorClass::Refused,
                    format!("disk {name} was detached meanwhile"),
                    "`aft disk list --local` shows the attached disks",
                )
            })?;
        if disk.phase == Some(DiskPhase::Protected) {
            return Ok(disk);
        }
        let trouble = if status.is_connected {
            String::new()
        } else {
            status.reason
        };
        drawn.draw(&line(&disk, &trouble));
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// One line: what is done, how fast it goes and how long it will take.
fn line(disk: &TappedDisk, trouble: &str) -> String {
    let mut text = format!("{}: {}", output::printable(&disk.name), phase(disk.phase));
    if disk.total_bytes > 0 {
        text.push_str(&format!(
            ", {} of {} ({})",
            output::bytes(disk.done_bytes),
            output::bytes(disk.total_bytes),
            output::percent(disk.done_bytes, disk.total_bytes)
        ));
    }
    if disk.rate_bytes > 0 && disk.total_bytes > disk.done_bytes {
        let left_ms =
            u128::from(disk.total_bytes - disk.done_bytes) * 1000 / u128::from(disk.rate_bytes);
        let left = output::span(u64::try_from(left_ms).unwrap_or(u64::MAX));
        text.push_str(&format!(
            ", {}/s, {left} left",
            output::bytes(disk.rate_bytes)
        ));
    }
    for why in [disk.reason.as_str(), trouble] {
        if !why.is_empty() {
            text.push_str(&format!("; {}", output::printable(why)));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk() -> TappedDisk {
        TappedDisk {
            name: "data".to_owned(),
            disk: afterimage_blockdev::DiskId([1; 16]),
            source: "/data.img".to_owned(),
            device: "/dev/loop0".to_owned(),
            link: "/dev/afterimage/data".to_owned(),
            size_bytes: 1 << 30,
            is_protected: true,
            phase: Some(DiskPhase::Initial),
            reason: String::new(),
            done_bytes: 256 << 20,
            total_bytes: 1 << 30,
            rate_bytes: 64 << 20,
            recheck_read_bytes: 0,
            recheck_sent_bytes: 0,
        }
    }

    #[test]
    fn says_how_far_how_fast_and_how_long() {
        assert_eq!(
            line(&disk(), ""),
            "data: first copy, 256.0 MiB of 1.0 GiB (25 %), 64.0 MiB/s, 12.0 s left"
        );
        let stalled = TappedDisk {
            rate_bytes: 0,
            total_bytes: 0,
            ..disk()
        };
        assert_eq!(
            line(&stalled, "not connected"),
            "data: first copy; not connected"
        );
    }
}
