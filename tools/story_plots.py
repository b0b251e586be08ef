"""The templates of the stories: beats of a plot, each a tuple of ways to say it.

Fields such as `{hero}` and `{colour}` are filled in from a story's world (`tools.stories.draw_world`); a
beat is one step of a story and a plot a list of beats. `|` inside a plot marks the start of a paragraph.
"""

from __future__ import annotations

from dataclasses import dataclass

Beat = tuple[str, ...]
PARAGRAPH: Beat = ("|",)

INTRODUCTION: Beat = (
    "Once upon a time, there was {a_trait} {kind} named {hero}. {He} lived {home}.",
    "Once upon a time, {a_trait} {kind} named {hero} lived {home}.",
    "Once upon a time, {home}, there lived {a_trait} {kind}. {His} name was {hero}.",
    "There once was {a_trait} {kind} called {hero} who lived {home}.",
    "{hero} was {a_trait} {kind}. {He} lived {home}.",
    "Long ago, {home}, there lived {a_trait} {kind} named {hero}.",
)
TREASURE: Beat = (
    "{hero} had {a_thing} and took it everywhere.",
    "{His} favourite thing was {a_thing}.",
    "{hero} had {one_thing} that {he} loved very much. It was {colour}.",
    "For {his} birthday, {hero} had been given {a_thing}.",
    "{hero} owned only one thing, and it was {a_thing}.",
)
FRIENDSHIP: Beat = (
    "{His} best friend was {a_fkind} named {friend}.",
    "{He} had a good friend, {a_fkind} called {friend}.",
    "{He} liked to play with {friend}, {a_fkind} who lived nearby.",
)
MORNING: Beat = (
    "One {weather} morning, {hero} went to the {place}.",
    "One {weather} day, {hero} walked to the {place} with the {thing}.",
    "It was a {weather} day when {hero} set off for the {place}.",
    "One day, {hero} took the {thing} to the {place}. It was a {weather} day.",
)
TOGETHER: Beat = (
    "One {weather} morning, {hero} and {friend} went to the {place}.",
    "One {weather} day, {friend} asked {hero} to come to the {place}.",
    "It was a {weather} day when the two friends set off for the {place}.",
)
MEETING: Beat = (
    "There {he} met {a_fkind} named {friend}.",
    'On the way, {he} saw {a_fkind}. "My name is {friend}," said the {fkind}.',
    "Near the gate sat {a_fkind} called {friend}.",
)
WEATHER_LINES: dict[str, Beat] = {
    "sunny": ("The sun shone and the birds sang.", "The sky was bright and blue."),
    "rainy": ("The rain fell softly on the leaves.", "There were puddles on every path."),
    "windy": ("The wind blew the leaves around.", "The trees bent and danced in the wind."),
    "snowy": ("Everything was white and quiet.", "Soft snow lay on the roofs."),
    "foggy": ("It was hard to see the trees.", "The fog lay over the path like milk."),
    "cloudy": ("Big clouds moved slowly across the sky.", "The clouds looked like sleepy sheep."),
    "warm": ("Bees flew from flower to flower.", "The air smelled of grass and flowers."),
    "cold": ("There was ice on the puddles.", "Everyone could see their own breath."),
}
MEAL: Beat = (
    "Afterwards, they sat down and ate some {food} together.",
    "They were hungry, so they shared some {food}.",
    "{friend} had brought some {food}, and they ate it all.",
    "Then they had a little picnic with some {food}.",
)
FEELING: Beat = (
    "{hero} felt {feel}.",
    "{hero} smiled, because {he} felt {feel}.",
    "That evening, {hero} felt {feel}.",
)
RECALL: Beat = (
    "Back home {home}, {he} put the {colour} {thing} beside {his} bed and fell asleep.",
    "From that day on, {hero} and {friend} were the best of friends, "
    "and the {colour} {thing} was always with them.",
    "Whenever {he} saw the {colour} {thing}, {he} thought of {friend}.",
    "That night, in the little house {home}, "
    "{hero} told {his} mother about {friend} and the {colour} {thing}.",
    "Then {hero} went back to {his} house {home}, with the {colour} {thing} in {his} arms.",
)
REMEMBER: Beat = (
    "{He} never forgot that {weather} day at the {place}.",
    "What a {weather} day it had been at the {place}!",
    "The {trait} {kind} often thought of that {weather} day and of the {place}.",
    "",
)
LAST: Beat = (
    "The end.",
    "And so the day ended well.",
    "The next morning, the {trait} {kind} was still {feel}.",
    "",
)


@dataclass(frozen=True)
class Plot:
    """The middle of a story, and what may be asked about it besides what every story tells."""

    beats: tuple[Beat, ...]
    friend_is_new: bool = False  # met in the story, not introduced at its start
    asks: tuple[str, ...] = ()  # keys of `tools.stories.QUESTIONS`


PLOTS: dict[str, Plot] = {
    "lost": Plot(
        (
            MORNING,
            ("WEATHER",),
            (
                "But when it was time to go home, the {thing} was gone.",
                "{He} played for a long time. Then {he} saw that the {thing} was gone.",
                "After a while, {he} looked down, and the {thing} was not there any more.",
            ),
            (
                "{hero} looked everywhere but could not find it. {He} began to cry.",
                '"Oh no!" cried {hero}. "Where can it be?"',
                "{He} looked to the left and to the right, but {he} could not see it.",
            ),
            PARAGRAPH,
            (
                '{friend} heard {him} and came at once. "Do not worry," {fhe} said. "I will help you."',
                'Then {friend} came along the path. "Let us look together," said {friend}.',
            ),
            (
                "They looked and looked. At last, {friend} found the {thing} {spot}.",
                "They searched for an hour. Then {friend} saw something {colour} {spot}. It was the {thing}!",
                '"Look!" called {friend}. There was the {thing}, {spot}.',
            ),
            (
                '"Thank you, {friend}!" said {hero}. "You are a true friend."',
                "{hero} jumped for joy and thanked {friend} again and again.",
            ),
        ),
        asks=("spot", "finder"),
    ),
    "storm": Plot(
        (
            TOGETHER,
            ("WEATHER",),
            (
                "Suddenly the sky turned dark, and a storm began.",
                "Then there was a loud bang. A storm was coming!",
                "All at once, thunder rolled over the hills.",
            ),
            (
                "{hero} was afraid of the thunder and held the {thing} tight.",
                '"I want to go home," said {hero}, and {he} held the {thing} close.',
            ),
            PARAGRAPH,
            (
                '"Follow me," said {friend}. {fHe} knew a small cave, and they ran to it.',
                '{friend} knew what to do. "Quick, into the cave!" {fhe} called.',
            ),
            (
                "Inside it was dry. {friend} sang a song until the storm was over.",
                "In the cave they told each other funny stories until the rain stopped.",
            ),
            MEAL,
        ),
        asks=("food", "helper", "shelter"),
    ),
    "hungry": Plot(
        (
            MORNING,
            ("WEATHER",),
            MEETING,
            (
                "{friend} looked sad and very hungry.",
                '"I have not eaten all day," said {friend}.',
            ),
            (
                "{hero} had only a little {food}, and {he} wanted to keep it.",
                "{hero} looked at {his} lunch. It was only some {food}.",
            ),
            PARAGRAPH,
            (
                'But then {he} thought, "Sharing is better than eating alone." So they shared the {food}.',
                '{He} thought for a moment. Then {he} said, "Sit with me and have half." '
                "They ate the {food} together.",
            ),
            (
                "Later, {hero} dropped the {thing} into deep water, and {friend} jumped in to get it back.",
                "On the way home, the {thing} fell into a hole. {friend} climbed down and brought it back.",
            ),
            (
                '"You helped me, and now I help you," said {friend}.',
                '"One good deed brings another," said {friend}.',
            ),
        ),
        friend_is_new=True,
        asks=("food", "helper"),
    ),
    "bridge": Plot(
        (
            TOGETHER,
            ("WEATHER",),
            (
                "They came to a high wall, and {hero} was afraid to climb it.",
                "They had to walk over a narrow log, and {hero} was afraid to fall.",
                "The path led through a dark tunnel, and {hero} did not want to go in.",
            ),
            ('"I cannot do it," {he} said.', "{His} legs shook, and {he} stood still."),
            PARAGRAPH,
            (
                '"I was afraid too, the first time," said {friend}. "Take one small step, and then another."',
                '"Close your eyes and think of something nice," said {friend}. "I am right behind you."',
            ),
            (
                "{hero} held the {thing} tight and took one step. Then {he} took another.",
                "{hero} thought of the {thing}, took a deep breath and started.",
            ),
            (
                'Soon {he} was on the other side. "I did it!" {he} shouted.',
                "Before {he} knew it, it was over.",
            ),
            MEAL,
        ),
        asks=("food", "helper"),
    ),
    "tower": Plot(
        (
            TOGETHER,
            ("WEATHER",),
            (
                "They wanted to build a little house out of sticks.",
                '"Let us build a house of our own," said {friend}.',
            ),
            (
                "They worked all morning, but the wind blew the house down.",
                "The house was nearly ready when it fell over with a crash.",
            ),
            (
                "{hero} was angry and wanted to give up.",
                '"It is no use," said {hero}, and {he} kicked the sticks.',
            ),
            PARAGRAPH,
            (
                '"Let us try again, with bigger sticks," said {friend}.',
                '{friend} was not angry. "Now we know how not to do it," {fhe} said.',
            ),
            (
                "This time they worked slowly, and the house stood firm.",
                "They tied the sticks together with grass. This time the house did not fall.",
            ),
            (
                "They put the {thing} inside, and it was the finest house of all.",
                "The {thing} was the first thing they carried into the house.",
            ),
            MEAL,
        ),
        asks=("food", "built"),
    ),
    "broken": Plot(
        (
            TOGETHER,
            ("WEATHER",),
            (
                "{friend} asked to hold the {thing}, but {fhe} dropped it, and it broke.",
                "While they played, {friend} fell over the {thing}, and it broke.",
            ),
            (
                "{hero} was so upset that {he} ran away.",
                '"Look what you have done!" cried {hero}.',
            ),
            (
                "{friend} was very sorry. {fHe} thought about it all night.",
                "{friend} felt terrible and did not know what to say.",
            ),
            PARAGRAPH,
            (
                "The next day, {friend} came with glue and string. "
                '"I am sorry," {fhe} said. "May I mend it?"',
                "The next day, {friend} knocked at the door. "
                '"I am sorry," {fhe} said. "Let us mend it together."',
            ),
            (
                "They mended the {thing} together, and soon it was as good as new.",
                "It took a long time, but in the end the {thing} was whole again.",
            ),
            ('"I am sorry that I shouted," said {hero}.', "{hero} forgave {friend} and gave {fhim} a hug."),
        ),
        asks=("breaker",),
    ),
    "chick": Plot(
        (
            MORNING,
            ("WEATHER",),
            (
                "There {he} heard a tiny cry. A baby bird had lost its mother.",
                "A baby bird sat alone on the ground and cried.",
            ),
            (
                "{hero} showed it the {thing}, and the baby bird stopped crying.",
                "{hero} let it sit next to the {thing}, and it grew calm.",
            ),
            PARAGRAPH,
            (
                "{He} asked {friend} for help, because {friend} knew every corner of the {place}.",
                'Just then {friend} came by. "I know where its nest is," said {friend}.',
            ),
            (
                "Together they found the nest {spot}.",
                "The nest was {spot}, and they carried the baby bird there.",
            ),
            (
                "The mother bird sang her best song to thank them.",
                "The mother bird was so glad that she danced around them.",
            ),
        ),
        asks=("nest", "helper", "lost_animal"),
    ),
    "race": Plot(
        (
            TOGETHER,
            ("WEATHER",),
            (
                "There was a race that day, and the prize was some {food}.",
                '"Let us race to the old tree," said {friend}. "The winner gets some {food}."',
            ),
            ("{hero} ran as fast as {he} could.", '"Three, two, one, go!" And off they ran.'),
            (
                "Near the end, {friend} fell and hurt {fhis} leg.",
                "Halfway there, {friend} fell into the mud.",
            ),
            PARAGRAPH,
            (
                "{hero} could have won, but {he} stopped and went back.",
                "{hero} did not think about winning. {He} turned around and helped {friend} up.",
            ),
            (
                "They walked to the end side by side, and they shared the {food}.",
                "They crossed the line together, and together they ate the {food}.",
            ),
            (
                '"Next time I will carry your {thing}," said {friend}.',
                "{friend} tied a flower to the {thing} to say thank you.",
            ),
        ),
        asks=("food", "who_fell"),
    ),
    "garden": Plot(
        (
            TOGETHER,
            ("WEATHER",),
            (
                "They found a tiny seed and planted it in the ground.",
                "{friend} had a seed, and they put it into the soft earth.",
            ),
            (
                "Every day they gave it water, but nothing grew.",
                "They waited and waited, but the ground stayed bare.",
            ),
            ('"It will never grow," said {hero}.', "{hero} was sad and wanted to dig it up."),
            PARAGRAPH,
            (
                '"Good things need time," said {friend}. "Let us wait a little longer."',
                '"Be patient," said {friend}. "The seed is only asleep."',
            ),
            (
                "One morning there was a small green leaf, and in summer there was a tall flower.",
                "After many days, a flower opened. It was taller than {friend}!",
            ),
            ("They hung the {thing} next to it.", "{hero} put the {thing} beside it and danced."),
            MEAL,
        ),
        asks=("food", "planted"),
    ),
    "quarrel": Plot(
        (
            TOGETHER,
            ("WEATHER",),
            (
                "{friend} wanted to play with the {thing}, but {hero} would not let go.",
                'Both of them wanted the {thing}. "It is mine!" shouted {hero}.',
            ),
            (
                "They pulled and pulled until both fell into a puddle.",
                "They did not speak to each other for a whole hour.",
            ),
            PARAGRAPH,
            (
                "Then {hero} looked at {friend}, and both began to laugh.",
                'It was no fun to play alone, so {hero} said, "I am sorry."',
            ),
            (
                '"Let us take turns," said {hero}. "You go first."',
                '"You may have it today, and I will have it tomorrow," said {hero}.',
            ),
            MEAL,
        ),
        asks=("food", "wanted"),
    ),
    "map": Plot(
        (
            TOGETHER,
            ("WEATHER",),
            (
                "On the ground lay an old map with a cross on it.",
                "There they found an old map.",
            ),
            (
                '"Perhaps it shows a treasure!" said {friend}.',
                '"Let us see where it leads," said {hero}.',
            ),
            PARAGRAPH,
            (
                "They walked ten steps to the left and twenty steps to the right.",
                "The way was long, and {hero} nearly forgot the {thing} on a stone.",
            ),
            (
                "At last they found a pot {spot}. It was full of {food}!",
                "The cross was {spot}. There they found a pot full of {food}.",
            ),
            (
                "They laughed and ate the {food} together.",
                '"What a tasty treasure!" said {friend}, and they ate the {food}.',
            ),
        ),
        asks=("food", "treasure", "found_map"),
    ),
    "newcomer": Plot(
        (
            MORNING,
            ("WEATHER",),
            MEETING,
            (
                "{friend} was new there and did not know anyone.",
                "{friend} sat alone and looked at the ground.",
            ),
            (
                '"Nobody wants to play with me," said {friend}.',
                "{fHe} was too shy to say hello.",
            ),
            PARAGRAPH,
            (
                '"Would you like to play with my {thing}?" asked {hero}.',
                '{hero} held out the {thing}. "We can play with it together," {he} said.',
            ),
            (
                "They played until the sun went down.",
                "Soon they were laughing and running around.",
            ),
            MEAL,
        ),
        friend_is_new=True,
        asks=("food", "met"),
    ),
    "ill": Plot(
        (
            MORNING,
            ("WEATHER",),
            (
                "{He} waited for {friend}, but {friend} did not come.",
                "{He} looked for {friend}, but nobody had seen {fhim}.",
            ),
            (
                "{friend} was ill and had to stay in bed.",
                "So {he} went to {friend}'s house. {friend} was ill in bed.",
            ),
            PARAGRAPH,
            (
                "{hero} made a plan. {He} brought some {food} and sat next to {friend}.",
                '"I will make you well," said {hero}, and {he} brought some {food}.',
            ),
            (
                "They ate the {food}, and {hero} let {fhim} hold the {thing}.",
                "{friend} held the {thing}, and together they ate the {food}.",
            ),
            (
                "After three days, {friend} was well again.",
                "The next morning, {friend} could get up and play.",
            ),
        ),
        asks=("food", "who_was_ill"),
    ),
    "astray": Plot(
        (
            MORNING,
            ("WEATHER",),
            (
                "{He} walked too far and lost {his} way.",
                "{He} followed a butterfly, and soon {he} did not know where {he} was.",
            ),
            (
                'It was getting dark. "Is anybody there?" {he} called.',
                '"How will I get home?" {he} asked, but nobody answered.',
            ),
            PARAGRAPH,
            (
                "Far away, {friend} saw something {colour}. It was the {thing}!",
                "{friend} was out looking for {him} and saw the {thing} from far away.",
            ),
            (
                "{fHe} ran to {hero} and showed {him} the way home.",
                '"Here you are!" said {friend}, and {fhe} led {him} home.',
            ),
            MEAL,
        ),
        asks=("food", "helper"),
    ),
}
