//! `aft branch`.

use std::path::Path;

use afterimage_blockdev::ErrorClass;
use afterimage_protocol::rest::branch::{
    BRANCH_MARK, Branch, CreateBranch, Promote, Promotion, PromotionState, SetQuota,
};
use afterimage_protocol::rest::time::format_rfc3339;

use super::live_line::LOOK_EVERY;
use super::mount::absolute;
use super::pace::Pace;
use crate::branch_args::BranchCommand;
use crate::client::Client;
use crate::error::AftError;
use crate::output::{self, Output, Table};

pub(super) async fn run(
    command: BranchCommand,
    server: &Client,
    output: &Output,
) -> Result<(), AftError> {
    match command {
        BranchCommand::Create {
            reference,
            name,
            quota,
            allow_incomplete,
        } => {
            let request = CreateBranch {
                reference,
                name,
                quota_bytes: quota,
                allow_incomplete,
            };
            let made: Branch = server.post("/v1/branches", &request).await?;
            output.answer(&made, || {
                let reference = reference_of(&made);
                format!("{reference} is made; `aft mount {reference}` shows it\n")
            });
            Ok(())
        }
        BranchCommand::List { place } => {
            let mut all = list(server).await?;
            if let Some(place) = place {
                all.retain(|branch| is_of(branch, &place));
            }
            output.answer(&all, || table(&all));
            Ok(())
        }
        BranchCommand::Quota { branch, size } => {
            let found = find(server, &branch).await?;
            let path = format!("/v1/branches/{}/quota", found.history);
            let request = SetQuota {
                quota_bytes: size.0,
            };
            let () = server.post(&path, &request).await?;
            output.answer(&request, || match size.0 {
                Some(size) => format!("{branch} may hold {}", output::bytes(size)),
                None => format!("{branch} has no limit"),
            });
            Ok(())
        }
        BranchCommand::Promote {
            branch,
            target,
            force,
            wait,
        } => promote(server, output, &branch, &target, (force, wait)).await,
        BranchCommand::Stop { branch } => {
            let found = find(server, &branch).await?;
            let path = format!("/v1/branches/{}/promotion", found.history);
            let () = server.delete(&path).await?;
            output.answer(&found.history, || {
                format!("the promotion of {branch} is stopped")
            });
            Ok(())
        }
        BranchCommand::Drop { branch } => {
            let found = find(server, &branch).await?;
            let path = format!("/v1/branches/{}", found.history);
            let () = server.delete(&path).await?;
            output.answer(&found.history, || format!("{branch} is dropped"));
            Ok(())
        }
    }
}

async fn list(server: &Client) -> Result<Vec<Branch>, AftError> {
    server.get("/v1/branches").await
}

fn reference_of(branch: &Branch) -> String {
    let Branch {
        machine,
        disk,
        name,
        ..
    } = branch;
    output::printable(&format!("{machine}/{disk}{BRANCH_MARK}{name}"))
}

fn is_of(branch: &Branch, place: &str) -> bool {
    match place.split_once('/') {
        Some((machine, disk)) => branch.machine == machine && branch.disk == disk,
        None => branch.machine == place,
    }
}

async fn find(server: &Client, wanted: &str) -> Result<Branch, AftError> {
    let all = list(server).await?;
    let is_meant = |branch: &Branch| {
        branch.history.to_string() == wanted || {
            let parts = wanted.split_once(BRANCH_MARK);
            parts.is_some_and(|(place, name)| is_of(branch, place) && branch.name == name)
        }
    };
    all.into_iter().find(is_meant).ok_or_else(|| {
        AftError::new(
            ErrorClass::Refused,
            format!("there is no branch {wanted:?}"),
            "write it as <machine>/<disk>@branch:<name>; `aft branch list` shows all",
        )
    })
}

fn table(all: &[Branch]) -> String {
    if all.is_empty() {
        return "There are no branches.\n".to_owned();
    }
    let mut table = Table::new(&[
        "BRANCH",
        "BASE",
        "MADE",
        "DISK",
        "OWN",
        "LIMIT",
        "USERS",
        "PROMOTION",
    ]);
    for branch in all {
        let limit = branch.quota_bytes.map(output::bytes);
        let promotion = branch.promotion.as_ref().map(describe);
        table.row([
            if branch.disk.is_empty() {
                format!("{} {}", branch.machine, branch.history)
            } else {
                reference_of(branch)
            },
            branch.base.to_string(),
            format_rfc3339(branch.created),
            output::bytes(branch.size_bytes),
            output::bytes(branch.used_bytes),
            limit.unwrap_or_else(|| "-".to_owned()),
            branch.users.to_string(),
            promotion.unwrap_or_else(|| "-".to_owned()),
        ]);
    }
    table.text()
}

fn describe(promotion: &Promotion) -> String {
    let Promotion {
        target,
        lsn,
        done_bytes,
        total_bytes,
        error,
        ..
    } = promotion;
    let percent = output::percent(*done_bytes, *total_bytes);
    match promotion.state {
        PromotionState::Copying => format!("LSN {lsn} to {target}: {percent} written"),
        PromotionState::Verifying => format!("LSN {lsn} to {target}: {percent} compared"),
        PromotionState::Done => format!("LSN {lsn} is in {target}"),
        PromotionState::Stopped => format!("LSN {lsn} to {target}: stopped"),
        PromotionState::Failed => format!("LSN {lsn} to {target}: failed: {error}"),
    }
}

async fn promote(
    server: &Client,
    output: &Output,
    branch: &str,
    target: &Path,
    (is_forced, waits): (bool, bool),
) -> Result<(), AftError> {
    let found = find(server, branch).await?;
    let path = format!("/v1/branches/{}/promotion", found.history);
    let target = absolute(target)?;
    let request = Promote { target, is_forced };
    let mut promotion: Promotion = server.post(&path, &request).await?;
    if waits {
        let history = found.history.to_string();
        promotion = tokio::select! {
            ended = wait(server, output, &history) => ended?,
            _ = tokio::signal::ctrl_c() => return Err(AftError::new(
                ErrorClass::Retry,
                "interrupted; the promotion goes on without being watched",
                "`aft branch list` shows how far it is, `aft branch stop` stops it",
            )),
        };
    }
    if promotion.state == PromotionState::Failed {
        return Err(AftError::new(
            ErrorClass::Operator,
            format!("the promotion of {branch} failed: {}", promotion.error),
            "",
        ));
    }
    output.answer(&promotion, || describe(&promotion));
    Ok(())
}

async fn wait(server: &Client, output: &Output, history: &str) -> Result<Promotion, AftError> {
    let mut pace = Pace::new("promoting", output);
    let ended = loop {
        let found = find(server, history).await?;
        let Some(promotion) = found.promotion else {
            let why = "the promotion is not known any more";
            break Err(AftError::new(ErrorClass::Retry, why, "start it again"));
        };
        if !promotion.state.is_running() {
            break Ok(promotion);
        }
        pace.look(promotion.done_bytes, promotion.total_bytes);
        tokio::time::sleep(LOOK_EVERY).await;
    };
    pace.end();
    ended
}
