// Package conformance tests what nats-server does that our code relies on and that its
// documentation does not promise, or promises otherwise. It has no code but tests. They run
// against the version in go.mod, on the embedded single server ("single") and, except where
// a row says so, on three nodes with three replicas ("three_nodes"), both with sync always.
//
// A test that fails after an upgrade names a behaviour that is another now. Look at the
// code in its row before anything else: it may lose or invert events in silence. Then say
// in the row, and in that code, what holds now.
//
// Code is named as package.identifier, below internal. "planned:" names what the design
// has and the repository does not have yet. TestTableNamesEveryTestAndCodeThatExists
// holds the table to the truth.
//
// Consumers:
//
//	behaviour | relied on by | test
//	A reset while nobody pulls starts again behind the acknowledgement floor, in stream order, consumer sequences from 1; NumPending counts what will come | broker.takeOver, broker.deliverInOrder | TestResetWhileNobodyPullsDeliversAgainFromTheOldestUnacknowledged
//	Whatever a reset met, consumer sequences without a gap mean that no stream sequence is skipped; copies of earlier ones may come between, not marked as redelivered | broker.deliverInOrder, router.accept | TestDeliveriesContiguousAfterAnyResetSkipNothing
//	An acknowledgement counts for its stream sequence, whichever delivery of it it answers | broker.ErrStale, broker.ack | TestAcknowledgementFromBeforeAResetSettlesTheSameStreamSequence
//	Unpin lets the next client have messages at once, and the last one's pull ends with 423 | broker.unpin, broker.pullStatus | TestUnpinFreesAPinAtOnce
//	A pin outlives its client until PinnedTTL | broker.pinnedTTL, broker.takeOver | TestPinOutlivesItsClientUntilItsTimeToLive
//	The hub's Nats-Pin-Id stands behind a published one | broker.deliverInOrder | TestPinIsToldBehindAPublishedHeaderOfItsName
//	A dead client's pulls go with its connection, long before they expire | broker.takeOver | TestPullsOfADeadClientGoWithItsConnection
//	A pull's heartbeat tells the last delivery | broker.deliverInOrder | TestPullHeartbeatTellsTheLastDelivery
//	A pull that expires says how many messages will not come | broker.pullStatus | TestExpiredPullGivesBackWhatDidNotCome
//	A pull ends with 409 when its consumer is deleted | broker.pullStatus | TestDeletedConsumerEndsItsPulls
//	A delivery's reply subject is $JS.ACK.stream.consumer.delivered.stream seq.consumer seq.time.pending | broker.parseMeta | TestDeliveryTellsItsSequencesInItsReplySubject
//	A stream has at most MaxConsumers consumers, 1,000 when that is -1 (single only) | broker.streams | TestConsumersOfAStreamAreLimited
//
// Publishing:
//
//	behaviour | relied on by | test
//	Compare-and-set takes a wildcard over the stored name; a wrong sequence is error 10071 and nothing is stored | planned: the edge's forwarder | TestCompareAndSetTakesAWildcardOverTheStoredName
//	Of compare-and-sets over the same filter in flight one is stored; the others are 10071, on three nodes 10164 | planned: the edge's forwarder | TestOfCompareAndSetsInFlightOneIsStored
//	On three nodes a compare-and-set over a wildcard does not see messages in flight; over a literal name it does (10164) | planned: the edge's forwarder, which therefore gives each message an id | TestCompareAndSetOverAWildcardDoesNotSeeWhatIsInFlightOnThreeNodes
//	A duplicate is acknowledged with Duplicate and the old sequence, which is no good for a compare-and-set | broker.PublishEvent, planned: the edge's forwarder | TestDuplicateIsAcknowledgedWithTheOldSequence
//	A duplicate whose condition is wrong is 10071 on one server, and a duplicate on three nodes | planned: the edge's forwarder | TestDuplicateWhoseConditionIsWrongIsRefusedByOneServerOnly
//	The same id in flight is stored once: the second is a duplicate or, on three nodes, 10158 | broker.errDuplicateInWork | TestDuplicateOfAMessageInFlightIsStoredOnce
//	An id is remembered for the duplicate window and not for ever | broker.streams, broker.PublishEvent | TestDuplicateWindowEnds
//	A duplicate in an atomic batch refuses all of it (10201), and its other ids are not remembered | planned: the edge's committer | TestDuplicateInsideAnAtomicBatchRefusesTheWholeBatch
//	No room for the subject, in the stream (10077), or for the message (10054): not stored, not remembered, and no error that means "later" | broker.attempt, broker.ErrRejected | TestRefusedForRoomIsNotStored
//	A subject at its limit stops no other | broker.streams | TestPerSubjectLimitLeavesOtherSubjectsAlone
//	FirstSeq is the first sequence, also in microseconds of the clock | planned: the edge's outbox | TestFirstSequenceComesFromTheClockThatMadeTheStream
//
// Subjects:
//
//	behaviour | relied on by | test
//	partition(n,1) is FNV-1a-32 of the token, modulo n | broker.partitionOf | TestPartitionOfASiteIsItsHashModuloPartitions
//	Permissions apply to the name published, not to the one stored; a wildcard asked for by direct get is literal text to them (single only) | broker.permissions, broker.LastEvent | TestPermissionsApplyToThePublishedSubject
//	A republished message has its Nats-Sequence, and Nats-Last-Sequence of its exact subject; duplicates are not republished | broker.streams, broker.FollowReports | TestRepublishedMessageTellsItsSequenceAndTheOneBeforeOfItsSubject
//
// Reading:
//
//	behaviour | relied on by | test
//	Direct get tells stream, subject, sequence and time in headers behind the published ones | broker.parseStored | TestDirectGetTellsWhereAMessageStandsBehindItsPublishedHeaders
//	Direct get of nothing is status 404 without these | broker.parseStored | TestDirectGetSaysNoneByAStatusWithoutSubjectOrSequence
//	In a batch each message tells the sequence of the one before, and 204 ends it | broker.readReports | TestDirectGetOfABatchTellsEachPredecessorAndItsEnd
//	On three nodes direct get may miss what is acknowledged ("none" below the last sequence is "later"); the leader's get never does | broker.LastEvent, broker.ReportsSince, broker.askLeader | TestDirectGetMayMissWhatIsAcknowledgedOnThreeNodesAndTheLeaderNever
//	The leader's get finds the first message of a filter at or behind a sequence | broker.askLeader, broker.takeOver | TestLeaderGetFindsTheFirstAtOrBehindASequence
//
// Push consumers:
//
//	behaviour | relied on by | test
//	An idle consumer says so, with its last delivery and stream sequence | broker.control, broker.LastContact | TestPushHeartbeatTellsTheLastDelivery
//	A delivery lost on its way shows in the next heartbeat and in the next delivery | broker.feed, broker.control | TestLostDeliveryShowsInTheNextHeartbeatAndTheNextDelivery
//	Flow control holds deliveries back until its question, or the heartbeat that repeats it, is answered | broker.control | TestFlowControlHoldsDeliveriesBackUntilItIsAnswered
//
// Restarts:
//
//	behaviour | relied on by | test
//	All that was acknowledged is there after a stop, a kill, and a stop of all nodes: messages, their ids, the creation time; the consumer, and its floor may be behind, never ahead (in memory: at nothing) | broker.StartEmbedded, broker.PublishEvent, broker.takeOver | TestEveryAcknowledgedMessageOutlivesTheServer
//	A replicated consumer in memory outlives its leader (three nodes only) | broker.partitionConsumer | TestReplicatedConsumerInMemoryOutlivesItsLeader
//	Every leader tells the same creation time (three nodes only) | broker.position | TestCreationTimeIsTheSameFromEveryLeader
//	A stream created anew has a later creation time and sequences from 1; what was delivered from the one before settles what has its sequence now | broker.position, broker.ErrStale | TestStreamCreatedAnewHasAnotherCreationTimeAndReusesSequences
package conformance
