//! `spec.deletionProtection`, enforced by the chart's admission policy.

use crate::stage::Stage;
use crate::support::eventually;
use kube::api::DeleteParams;
use serde_json::json;
use sluice::resources::conditions::kind;
use sluice::resources::{Mirror, Source, Target};

#[tokio::test(flavor = "multi_thread")]
async fn the_policy_of_the_chart_refuses_what_is_protected() {
    let mut stage = Stage::set().await;
    let name = stage.apply_policy_of_the_chart().await;
    stage.stop_operator().await;
    stage.start_operator(|options| options.deletion_policy_name = name).await;
    stage.source(json!({"deletionProtection": true})).await;
    stage.target().await;
    stage.mirror("orders", json!({"deletionProtection": true, "deletionPolicy": {"slot": "Retain", "publication": "Retain"}})).await;

    // A policy takes a moment to be in force. A dry run is admitted or refused as a true one is.
    let dry = DeleteParams { dry_run: true, ..DeleteParams::default() };
    let refusal = async || stage.api::<Mirror>().delete("orders", &dry).await.err();
    eventually(60, "the policy is in force", async || refusal().await.is_some()).await;
    let why = stage.api::<Mirror>().delete("orders", &DeleteParams::default()).await.expect_err("refused").to_string();
    assert!(why.contains("Mirror orders has spec.deletionProtection set; set it to false"), "{why}");
    assert!(stage.api::<Source>().delete("shop", &DeleteParams::default()).await.is_err());
    assert!(stage.api::<Target>().delete("dw", &dry).await.is_ok(), "it is not protected");
    let says = async || {
        let status = stage.get::<Source>("shop").await.and_then(|source| source.status).unwrap_or_default();
        let found = status.conditions.into_iter().find(|condition| condition.type_ == kind::DELETION_PROTECTED);
        found.is_some_and(|condition| (condition.status.as_str(), condition.reason.as_str()) == ("True", "PolicyInForce"))
    };
    eventually(20, "the Source says so", says).await;

    stage.patch::<Mirror>("orders", json!({"spec": {"deletionProtection": false}})).await;
    stage.delete::<Mirror>("orders").await;
    eventually(20, "the Mirror is gone", async || stage.is_gone::<Mirror>("orders").await).await;
    stage.patch::<Source>("shop", json!({"spec": {"deletionProtection": false}})).await;
    stage.delete::<Source>("shop").await;
    eventually(20, "the Source is gone", async || stage.is_gone::<Source>("shop").await).await;
    stage.end().await;
}
