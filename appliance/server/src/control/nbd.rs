//! Where disks are served over NBD.

use std::sync::Arc;

use afterimage_blockdev::ErrorClass;
use afterimage_protocol::rest::nbd::{NbdExport, NbdExports};
use axum::Json;
use axum::extract::State;

use super::answer::Answer;
use crate::appliance::{Appliance, api_error};
use crate::nbd::StoreExports;

pub(super) async fn list(State(appliance): State<Arc<Appliance>>) -> Answer<NbdExports> {
    let config = &appliance.config;
    let socket = config.nbd_socket_path(&appliance.data_dir);
    let socket = config.nbd.is_local.then(|| socket.display().to_string());
    let names = StoreExports::new(Arc::clone(&appliance)).names().await;
    let names =
        names.map_err(|refusal| api_error(ErrorClass::Retry, refusal.to_string(), "try again"))?;
    let exports = names.into_iter().map(|export| NbdExport {
        name: export.name,
        description: export.description,
    });
    Ok(Json(NbdExports {
        socket,
        port: appliance.nbd_port,
        exports: exports.collect(),
    }))
}
