//! Whether something enforces `spec.deletionProtection`.

use crate::operator::apply::DEADLINE;
use crate::operator::context::Context;
use crate::operator::error::{OperatorError, Result};
use k8s_openapi::api::admissionregistration::v1::{ValidatingAdmissionPolicy, ValidatingAdmissionPolicyBinding};
use kube::Api;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::time::{Instant, timeout};

/// How long an answer is used.
const REMEMBERED: Duration = Duration::from_secs(60);

/// Looks for the policy that the chart installs, and for its binding: without, a policy does nothing. Many objects share one answer.
#[derive(Debug, Default)]
pub struct DeletionPolicy {
    last: Mutex<Option<(Instant, bool)>>,
}

impl DeletionPolicy {
    /// Whether the policy is there and bound; `None` when that can't be told.
    pub async fn is_in_force(&self, ctx: &Context) -> Option<bool> {
        let last = *self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, there)) = last.filter(|(when, _)| when.elapsed() < REMEMBERED) {
            return Some(there);
        }
        match look(ctx).await {
            Ok(there) => {
                *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), there));
                Some(there)
            }
            Err(error) => {
                tracing::warn!(reason = error.reason, message = error.message, "cannot tell whether deletionProtection is enforced");
                None
            }
        }
    }
}

async fn look(ctx: &Context) -> Result<bool> {
    let policies = Api::<ValidatingAdmissionPolicy>::all(ctx.client.clone());
    let bindings = Api::<ValidatingAdmissionPolicyBinding>::all(ctx.client.clone());
    let name = &ctx.options.deletion_policy_name;
    let both = async { futures::try_join!(policies.get_metadata_opt(name), bindings.get_opt(name)) };
    match timeout(DEADLINE, both).await {
        Ok(found) => {
            let (policy, binding) = found?;
            Ok(policy.is_some() && binding.is_some_and(|binding| denies(&binding, name)))
        }
        Err(_) => Err(OperatorError::deadline(format!("get ValidatingAdmissionPolicy {name} and its binding"))),
    }
}

fn denies(binding: &ValidatingAdmissionPolicyBinding, policy: &str) -> bool {
    let spec = binding.spec.as_ref();
    spec.is_some_and(|spec| {
        spec.policy_name.as_deref() == Some(policy) && spec.validation_actions.iter().flatten().any(|action| action == "Deny")
    })
}
