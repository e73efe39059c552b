"""Words that `items` does not take for characters or for things."""

# ruff: noqa: SIM905 -- words are easier to read and to extend as text

NOT_NAMES = frozenset(
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday May Christmas Halloween Easter Birthday God Earth English"
    " It The End Yes No Oh True Little Big Mr Mrs Ms Miss Dr".split()
)

# Nouns that are not things which can be picked up, opened or given.
ANIMATE = frozenset(
    "adult alien alligator angel animal animals ant ants artist babies baby baker barber bat bear bears bee bees"
    " beetle bird birds boy boys bride brother bug bugs bull bully bunny butterflies butterfly captain cashier cat"
    " caterpillar cats chef chick chicken chickens child children class clerk clown cop couple cow cows crab"
    " creature cricket crocodile crow crowd cub dad daddy dancer daughter deer dentist dinosaur doctor dog dogs"
    " dolphin dove dragon driver duck duckling ducks eagle elephant everyone fairy family farmer father fireman"
    " firemen fish fisherman flea fly fox friend friends frog frogs ghost giant giraffe girl girls goat goose"
    " gorilla groom group guard guest guests guy hen hero hippo horse horses hunter infant insect insects"
    " jellyfish judge kid kids king kitten kitty knight ladies lady ladybug lawyer leader leopard librarian lion"
    " lizard mailman man manager mechanic men mermaid mice mole mom mommy monkey monkeys monster monsters mosquito"
    " mother mouse mule mummy musician nurse octopus officer ostrich other others otter owl owner ox oyster"
    " painter parent parents parrot pelican penguin people person pet pig pigeon pigeons pigs pilot pirate player"
    " police policeman pony prince princess pup puppies puppy queen rabbit rabbits raccoon rat raven reindeer"
    " rhino rhinoceros robber robot rooster sailor salesman seal servant shark sheep shopkeeper shrimp sister"
    " snail snake snowman soldier son spider spirit squirrel squirrels stranger student students swan teacher team"
    " teddy thief tiger toad toddler troll turkey turtle tutor twins vendor vet visitor waiter waitress whale"
    " winner witch wizard wolf woman women worker workers worm worms zebra zookeeper".split()
)
PLACES = frozenset(
    "airport alley attic backyard bakery bank barn basement bath bathroom bathtub beach bedroom bridge building"
    " bush bushes cabin camp castle cave ceiling church circus city classroom clearing cliff club corridor cottage"
    " country countryside creek crib dam den desert ditch door doors doorway entrance exit factory farm fence"
    " field fields forest fort fountain garage garden gate gym hall harbor hedge hill hills hive hole holes"
    " horizon hospital hotel house houses hut igloo island jail jungle kingdom kitchen lab lake land lawn library"
    " living mall market maze meadow mill mine mountain mountains museum nation neighborhood nest ocean office"
    " palace park path pier pit planet playground pond pool porch port prison puddle puddles racetrack ranch reef"
    " restaurant rink river road roof room rooms sandbox sandpit school sea sewer shade shed shop shore sidewalk"
    " sink slide slope square stable stadium stage stairs station steps store stove stream street streets studio"
    " subway swamp swing swings theater tower town track tracks trail tree trees tunnel university valley village"
    " volcano wall walls well window windows woods world yard zone zoo".split()
)
ABSTRACT = frozenset(
    "adventure advice afternoon air alarm alphabet answer answers area autumn beat beginning behavior best big"
    " bigger birthday bit bite bottom bravery break breakfast breeze bump call care center chance change choice"
    " class clean clear climb cloud clouds cold color colors contest corner cough courage cut dance danger dark"
    " darkness day days deal decision difference difficulty dinner dirt discovery distance dive dot dream drive"
    " earth east echo edge effort end evening event excitement experience fact fall fastest favorite feeling"
    " festival fight fire first flame flood floor fog front fun funny future game games good grass ground group"
    " growth guess habit half harvest heat help highest holiday home hop hope hug hurricane idea ideas image"
    " inside itch job joke journey joy jump kick kindness kiss last laughter law laws leak learning lecture left"
    " lesson life light lightning line little look lot lots love luck lunch magic mark market massage matter meal"
    " meeting memory mess message middle minute mischief mission moment moments month moon moral more morning most"
    " movement movie music mystery name names nap need new news next night noise noises north number numbers old"
    " one ones operation opposite order outside own pain parade party past pattern patterns peace performance"
    " picnic piece pieces place plan play point pose power present presents price problem problems promise"
    " question questions race rain rainbow rare reason rest reward rhyme rhythm ride right row rule rules run rush"
    " same sand scene scent score search season second secret sense shadow shadows shape shapes shine show side"
    " sight sign silence single size sky sleep smaller smell smoke snow song songs sound sounds south space speed"
    " spell splash sport spot spring stain stand star stars start steam stop stories storm story strength sudden"
    " summer sun sunlight sunrise sunset sunshine supper surface surprise swim talk task taste tear test thing"
    " things third thought thoughts thunder tide time times tip top tornado touch tour trade tradition trick"
    " tricks trip trips trouble truth turn two universe vacation view visit voice voices wait walk war warmth"
    " waste water wave waves way weather week weekend weight west whole will wind winter wish wishes wonder word"
    " words work wrong year years young yummy".split()
)
BODY = frozenset(
    "arm arms back beak belly blood body cheek cheeks ear ears eye eyes face feet finger fingers foot fur hair"
    " hand hands head heads heart knee leg legs lips mouth neck nose paw paws shoulder skin stomach tail teeth"
    " throat thumb thumbs toe toes tongue tooth tummy wing wings".split()
)
# Words for any thing: one of them and another noun may mean the same thing.
GENERIC = frozenset(
    "creation drink fabric food foods fruit fruits furniture gem gems gift gifts goods ingredients item items"
    " jewel jewels label liquid material meal medicine mix mixture object objects package pair parcel part parts"
    " picture pictures pile plant plants prize product property scrap set snack snacks stack stuff supplies"
    " surprise tool tools toy toys trash treasure treat treats vegetable vegetables".split()
)
# Parts of a thing: what is done to one is done to the other.
PARTS = frozenset(
    "branch button collar cover engine flap frame handle hood hook key keyhole knob leaf lid lock page pages"
    " pedal petal pocket root sail screw seat sleeve spout stem string strings switch tank trunk wheel wheels zip"
    " zipper".split()
)
NOT_THINGS = ANIMATE | ABSTRACT | BODY | GENERIC | PARTS
