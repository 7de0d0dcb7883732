//! Signed calls to workers. Plain HTTP inside the cluster, straight to the pod's address.

use super::signing::SigningKeys;
use crate::worker::contract::{Desired, Status, VERSION};
use reqwest::{Method, Response, StatusCode, header};
use std::net::IpAddr;
use std::time::Duration;

/// Longest time of a status call, connection and body included.
const STATUS_DEADLINE: Duration = Duration::from_secs(2);
/// Longest time of a push.
const PUSH_DEADLINE: Duration = Duration::from_secs(5);
/// Longest status taken, in bytes: twenty table errors of 1 kB and names fit many times. With 256 polls in flight this bounds memory.
const STATUS_LIMIT: usize = 256 * 1024;
/// How much of a refusal is shown, in bytes.
const REFUSAL_LIMIT: usize = 512;

/// Why a call to a worker failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WorkerError {
    /// No connection, or no answer in time.
    #[error("the worker at {address} does not answer: {why}; is port 8080 open from the operator's pods (NetworkPolicy)?")]
    Unreachable {
        /// Where it was looked for.
        address: String,
        /// What went wrong.
        why: String,
    },
    /// The worker does not take our token: it knows another key, or belongs to another Mirror.
    #[error("the worker refuses the operator's signature")]
    Unauthorized,
    /// The worker already has a newer document.
    #[error("the worker already follows a newer generation: {0}")]
    Outdated(String),
    /// The worker speaks a version of the contract that this operator does not.
    #[error("the worker speaks version {0} of the contract")]
    Contract(u32),
    /// The answer makes no sense.
    #[error("the worker's answer is not understood: {0}")]
    BadAnswer(String),
}

impl WorkerError {
    /// Constant for conditions and labels of metrics.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Unreachable { .. } => "WorkerUnreachable",
            Self::Unauthorized => "WorkerUnauthorized",
            Self::Outdated(_) => "WorkerAhead",
            Self::Contract(_) => "WorkerOutdated",
            Self::BadAnswer(_) => "WorkerBadAnswer",
        }
    }
}

/// `host:port` of the worker with this pod address; IPv6 in brackets.
pub fn address(pod_ip: &str, port: u16) -> String {
    match pod_ip.parse::<IpAddr>() {
        Ok(IpAddr::V6(ip)) => format!("[{ip}]:{port}"),
        _ => format!("{pod_ip}:{port}"),
    }
}

/// Calls workers; keeps connections. Cheap to clone.
#[derive(Clone)]
pub struct WorkerClient {
    http: reqwest::Client,
    keys: SigningKeys,
}

impl WorkerClient {
    /// Calls are signed with `keys`.
    ///
    /// # Errors
    /// When the HTTP client cannot be made.
    pub fn new(keys: SigningKeys) -> reqwest::Result<Self> {
        let http = reqwest::Client::builder()
            // Pod addresses are never behind the cluster's way out, and a worker redirects nobody.
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(STATUS_DEADLINE)
            .pool_max_idle_per_host(1)
            .pool_idle_timeout(Duration::from_secs(60))
            .build()?;
        Ok(Self { http, keys })
    }

    /// Reads the status of the worker of the Mirror with uid `audience`.
    ///
    /// # Errors
    /// [`WorkerError`], also for a contract that is neither this version nor the one before.
    pub async fn status(&self, address: &str, audience: &str) -> Result<Status, WorkerError> {
        let call = async {
            let answer = self.send(Method::GET, address, "/v1/status", audience, Vec::new()).await?;
            if answer.status() != StatusCode::OK {
                return Err(refusal(answer).await);
            }
            let body = bounded(answer, STATUS_LIMIT).await?;
            let status: Status = serde_json::from_slice(&body).map_err(|error| WorkerError::BadAnswer(error.to_string()))?;
            if supported(status.contract) { Ok(status) } else { Err(WorkerError::Contract(status.contract)) }
        };
        in_time(STATUS_DEADLINE, address, call).await
    }

    /// Pushes a hot change to the worker.
    ///
    /// # Errors
    /// [`WorkerError`]; `Outdated` when the worker has a newer generation.
    pub async fn put_desired(&self, address: &str, audience: &str, desired: &Desired) -> Result<(), WorkerError> {
        let body = serde_json::to_vec(desired).map_err(|error| WorkerError::BadAnswer(error.to_string()))?;
        let call = async {
            let answer = self.send(Method::PUT, address, "/v1/desired", audience, body).await?;
            if answer.status().is_success() { Ok(()) } else { Err(refusal(answer).await) }
        };
        in_time(PUSH_DEADLINE, address, call).await
    }

    async fn send(&self, method: Method, address: &str, path: &str, audience: &str, body: Vec<u8>) -> Result<Response, WorkerError> {
        let token = self.keys.sign(audience, &body).map_err(|error| WorkerError::BadAnswer(error.to_string()))?;
        let mut request = self.http.request(method, format!("http://{address}{path}")).bearer_auth(token);
        if !body.is_empty() {
            request = request.header(header::CONTENT_TYPE, "application/json").body(body);
        }
        request.send().await.map_err(|error| unreachable(address, super::error::chain(&error.without_url())))
    }
}

/// This version of the contract and the one before.
fn supported(contract: u32) -> bool {
    contract == VERSION || contract + 1 == VERSION
}

async fn in_time<T>(deadline: Duration, address: &str, call: impl Future<Output = Result<T, WorkerError>>) -> Result<T, WorkerError> {
    match tokio::time::timeout(deadline, call).await {
        Ok(result) => result,
        Err(_) => Err(unreachable(address, format!("no answer within {} s", deadline.as_secs()))),
    }
}

fn unreachable(address: &str, why: String) -> WorkerError {
    WorkerError::Unreachable { address: address.to_owned(), why }
}

async fn refusal(answer: Response) -> WorkerError {
    let status = answer.status();
    let said = match bounded(answer, 64 * REFUSAL_LIMIT).await {
        Ok(body) => String::from_utf8_lossy(&body[..body.len().min(REFUSAL_LIMIT)]).trim().to_owned(),
        Err(_) => String::new(),
    };
    match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => WorkerError::Unauthorized,
        StatusCode::CONFLICT => WorkerError::Outdated(said),
        _ => WorkerError::BadAnswer(format!("{status}: {said}")),
    }
}

async fn bounded(mut answer: Response, limit: usize) -> Result<Vec<u8>, WorkerError> {
    let mut body = Vec::new();
    while let Some(piece) = answer.chunk().await.map_err(|error| WorkerError::BadAnswer(super::error::chain(&error.without_url())))? {
        if body.len() + piece.len() > limit {
            return Err(WorkerError::BadAnswer(format!("longer than {limit} bytes")));
        }
        body.extend_from_slice(&piece);
    }
    Ok(body)
}

#[cfg(test)]
mod tests {
    use super::{VERSION, address, supported};

    #[test]
    fn addresses_of_both_families() {
        assert_eq!(address("10.1.2.3", 8080), "10.1.2.3:8080");
        assert_eq!(address("fd00::7", 8080), "[fd00::7]:8080");
    }

    #[test]
    fn the_contract_before_is_spoken_too() {
        assert!(supported(VERSION) && supported(VERSION - 1) && !supported(VERSION + 1));
    }
}
