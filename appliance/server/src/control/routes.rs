//! Which request goes where.

use std::sync::Arc;

use afterimage_blockdev::ErrorClass;
use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::StatusCode;
use axum::middleware::from_fn;
use axum::routing::{delete, get, post};

use super::access::admins_only;
use super::answer::Failure;
use super::{branches, enrol, machines, mounts, nbd, policy, seeds, space, status, store, vhost};
use crate::appliance::Appliance;

/// Makes the routes. Each connection adds who its caller is.
pub fn router(appliance: Arc<Appliance>) -> Router {
    let body_bytes_max = appliance.config.control.body_bytes_max;
    let for_all = Router::new()
        .route("/v1/enrol", post(enrol::enrol))
        .route("/v1/renew", post(enrol::renew));
    let for_admins = Router::new()
        .route("/v1/status", get(status::status))
        .route("/v1/machines", get(status::machines))
        .route("/v1/machines/{machine}/disks", get(status::disks))
        .route("/v1/machines/{machine}/move", post(machines::move_machine))
        .route(
            "/v1/machines/{machine}/points",
            get(machines::list_points).post(machines::create_point),
        )
        .route(
            "/v1/machines/{machine}/points/{name}",
            delete(machines::delete_point),
        )
        .route(
            "/v1/machines/{machine}/policy",
            get(policy::show).post(policy::set),
        )
        .route(
            "/v1/machines/{machine}/deletions",
            post(policy::delete).layer(DefaultBodyLimit::max(policy::BODY_BYTES_MAX)),
        )
        .route(
            "/v1/machines/{machine}/locks",
            post(policy::lock).layer(DefaultBodyLimit::max(policy::BODY_BYTES_MAX)),
        )
        .route("/v1/machines/{machine}/space", get(space::points))
        .route("/v1/clock/confirm", post(policy::confirm_clock))
        .route("/v1/space", get(space::show))
        .route("/v1/quotas", post(space::set_quota))
        .route("/v1/nbd", get(nbd::list))
        .route("/v1/vhost", get(vhost::list).post(vhost::serve))
        .route("/v1/vhost/{socket}", delete(vhost::end))
        .route("/v1/mounts", get(mounts::list).post(mounts::create))
        .route("/v1/mounts/{id}", delete(mounts::remove))
        .route("/v1/branches", get(branches::list).post(branches::create))
        .route("/v1/branches/{history}", delete(branches::remove))
        .route("/v1/branches/{history}/quota", post(branches::set_quota))
        .route(
            "/v1/branches/{history}/promotion",
            post(branches::promote).delete(branches::stop_promotion),
        )
        .route("/v1/seeds", get(seeds::list).post(seeds::create))
        .route("/v1/seeds/{machine}/{disk}", delete(seeds::remove))
        .route("/v1/seeds/{machine}/{disk}/ready", post(seeds::ready))
        .route("/v1/store/collect", post(store::collect))
        .route(
            "/v1/store/scrub",
            get(store::scrub_status)
                .post(store::scrub)
                .delete(store::stop_scrub),
        )
        .route("/v1/log/verify", post(machines::verify))
        .route("/v1/tokens", post(enrol::create_token))
        .route("/v1/certificates/admin", post(enrol::issue_admin))
        .route("/v1/agents", get(enrol::agents))
        .route("/v1/agents/{agent}/revoke", post(enrol::revoke))
        .route("/v1/events", get(status::events))
        .layer(from_fn(admins_only));
    for_all
        .merge(for_admins)
        .fallback(not_found)
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(body_bytes_max))
        .with_state(appliance)
}

async fn not_found() -> Failure {
    let hint = "aft and afterimaged may be of different releases";
    Failure::new(
        StatusCode::NOT_FOUND,
        ErrorClass::Refused,
        "there is no such request",
        hint,
    )
}

async fn wrong_method() -> Failure {
    let status = StatusCode::METHOD_NOT_ALLOWED;
    Failure::new(
        status,
        ErrorClass::Refused,
        "there is no such request with this method",
        "",
    )
}
